"""Choose modules of a model by name, by class, or by a predicate."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import nn

from lightning_optim.base.construction import written
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.base.selection import is_selector, listed
from lightning_optim.base.suggestions import nearest, nearest_pattern, shown

ModuleSelector: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
ModuleSelectors: TypeAlias = ModuleSelector | Sequence[ModuleSelector]


def check_module_selectors(name: str, value: ModuleSelectors) -> ModuleSelectors:
    """Check that :func:`select_modules` can choose modules by the argument ``name``, and return it.

    Raises:
        ValueError: If it is neither a glob, a class, a predicate nor a list of one or more of these.
    """
    several = listed(value)
    if not several or not all(is_selector(selector) for selector in several):
        raise ValueError(
            f"`{name}` must be a glob over module names, a module class, a predicate (name, module) -> bool, or a list"
            f" of one or more of these, got {written(value)}"
        )
    return value


def described(selectors: ModuleSelectors) -> list[str]:
    """Return the globs as they are, and classes and predicates by name: a text that holds no memory address."""
    return [
        selector if isinstance(selector, str) else getattr(selector, "__qualname__", type(selector).__qualname__)
        for selector in listed(selectors)
    ]


def select_modules(model: nn.Module, on: ModuleSelectors, *, required: bool = True) -> dict[str, nn.Module]:
    """Choose modules whose outputs a technique reads.

    A name in full takes that module. A glob takes the innermost of the modules that it matches: ``"encoder.*"`` the
    layers within the encoder, and not also the blocks that hold them. A class takes all modules of this class, and a
    predicate ``(name, module) -> bool`` those for which it is true.

    Modules that a model never calls as such are not among them: parametrizations, and the projection of
    ``nn.MultiheadAttention``. For a module within ``torch.compile`` it is the compiled one.

    Args:
        model: The model.
        on: A selector, or a list of them.
        required: Raise if a selector matches nothing.

    Returns:
        Name to module in the model's order; a shared module once.

    Raises:
        ValueError: If a selector matches nothing; the message names the nearest one.

    Example::

        >>> block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> model = nn.Sequential(block, nn.Linear(2, 1))
        >>> list(select_modules(model, "*")), list(select_modules(model, "0")), list(select_modules(model, "?"))
        (['0.0', '0.1', '1'], ['0'], ['0', '1'])
        >>> list(select_modules(model, nn.ReLU)), list(select_modules(model, ["1", nn.ReLU]))
        (['0.1'], ['0.1', '1'])
    """
    kinds = _named(model)
    chosen: set[str] = set()
    for selector in listed(on):
        hits = _matches(kinds, selector)
        if required and not hits:
            raise _nothing(model, kinds, selector)
        chosen |= hits
    modules = {name: same[0] for name, same in kinds.items() if name in chosen}
    first = {id(module): name for name, module in reversed(modules.items())}
    return {name: module for name, module in modules.items() if first[id(module)] == name}


def _named(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the modules by plain name; a compiled module and the one in it share a name, the outer one first."""
    uncalled = uncalled_modules(model)
    named: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and id(module) not in uncalled:
            named.setdefault(plain_name(name).removesuffix("._orig_mod"), []).append(module)
    return named


def uncalled_modules(model: nn.Module) -> set[int]:
    """Return the ``id`` of each module that a model does not call as a layer.

    A parametrization computes a weight, and attention reads the weights of its projection.
    """
    return {
        id(inner)
        for module in model.modules()
        for name, child in module.named_children()
        if name == "parametrizations" or isinstance(module, nn.MultiheadAttention)
        for inner in child.modules()
    }


def _matches(kinds: dict[str, list[nn.Module]], selector: ModuleSelector) -> set[str]:
    if isinstance(selector, str):
        if selector in kinds:
            return {selector}
        hits = fnmatch.filter(kinds, selector)
        outer = {name.rsplit(".", count)[0] for name in hits for count in range(1, name.count(".") + 1)}
        return set(hits) - outer
    if isinstance(selector, type):
        return {name for name, same in kinds.items() if any(isinstance(module, selector) for module in same)}
    return {name for name, same in kinds.items() if any(selector(name, module) for module in same)}


def _nothing(model: nn.Module, kinds: dict[str, list[nn.Module]], selector: ModuleSelector) -> ValueError:
    """Make the error for a selector that matches no module."""
    if isinstance(selector, str):
        text, near, known = repr(selector), nearest_pattern(selector, kinds), list(kinds)
    else:
        known = sorted({type(module).__name__ for same in kinds.values() for module in same})
        text = getattr(selector, "__name__", repr(selector))
        near = nearest(text, known) if isinstance(selector, type) else ""
    what = "modules" if isinstance(selector, str) else "kinds of modules"
    return ValueError(
        f"`on={text}` matches no module of {type(model).__name__}{near or '.'} Its {what}: {shown(known)}"
    )
