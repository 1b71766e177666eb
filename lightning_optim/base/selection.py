"""Choose parameters of a module by name, by the class of their owner, or by a predicate."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_optim.base.construction import written
from lightning_optim.base.module_tensors import dimensions, plain_name
from lightning_optim.base.shards import reshard_
from lightning_optim.base.suggestions import nearest, nearest_pattern, shown

Selector: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Parameter], bool]
Selectors: TypeAlias = Selector | Sequence[Selector] | None


def check_selectors(name: str, value: Selectors) -> Selectors:
    """Check that :func:`select` can choose parameters by the argument ``name``, and return it.

    Raises:
        ValueError: If it is neither a glob, a class, a predicate, a list of these nor ``None``, or if ``on`` is an
            empty list.
    """
    several = listed(value)
    known = value is None or all(is_selector(selector) for selector in several)
    if not known or (name == "on" and not several):
        raise ValueError(
            f"`{name}` must be a glob over parameter names, a module class, a predicate (name, parameter) -> bool,"
            f" a list of {'' if name == 'exclude' else 'one or more of '}these or None, got {written(value)}"
        )
    return value


def is_selector(value: Any) -> bool:
    """Return True for a name, a class or a function. A module can be called too, but is no predicate."""
    return isinstance(value, str) or (callable(value) and not isinstance(value, nn.Module))


def listed(selectors: Any) -> Sequence[Any]:
    """Return selectors as a list: one alone is a list of one."""
    return selectors if isinstance(selectors, Sequence) and not isinstance(selectors, str) else [selectors]


def select(
    module: nn.Module,
    on: Selectors = None,
    exclude: Selectors = None,
    *,
    required: bool = True,
) -> dict[str, nn.Parameter]:
    """Choose parameters by name, by the type of the module that owns them, or by a predicate.

    Args:
        module: The model.
        on: A glob over parameter names (``"encoder.*"``; ``"*"`` is all), a module class (its own parameters), a
            predicate ``(name, parameter) -> bool``, or a list of these. ``None`` takes the parameters with two
            dimensions or more: weights of layers, and neither biases nor the scales of normalization layers.
        exclude: The parameters to leave out, in the same terms.
        required: Raise if a glob or a class matches nothing.

    Returns:
        Name to parameter in the model's order; a tied parameter once. Frozen parameters are in it: check
        ``requires_grad`` when you act on them, since a model may be unfrozen during training.

    Raises:
        ValueError: If an argument is not one of these, or if a glob or a class matches nothing; the message names
            the nearest one.

    Example::

        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        >>> list(select(model))
        ['0.weight']
        >>> list(select(model, on="*", exclude=nn.LayerNorm))
        ['0.weight', '0.bias']
    """
    check_selectors("on", on)
    check_selectors("exclude", exclude)
    named = {plain_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    chosen = set(named) if on is None else _matches(module, named, on, "on", required)
    if on is None:
        chosen = {name for name in chosen if not is_lazy(named[name]) and dimensions(named[name]) >= 2}
    if exclude is not None:
        left_out = _matches(module, named, exclude, "exclude", required)
        out = {id(named[name]) for name in left_out}  # a tied parameter is left out under each of its names
        chosen = {name for name in chosen if id(named[name]) not in out}
    first = {id(p): name for name, p in reversed(named.items()) if name in chosen}
    return {name: p for name, p in named.items() if first.get(id(p)) == name}


def _matches(
    module: nn.Module,
    named: dict[str, nn.Parameter],
    selectors: Selector | Sequence[Selector],
    argument: str,
    required: bool,
) -> set[str]:
    found: set[str] = set()
    for selector in listed(selectors):
        if isinstance(selector, str):
            hits = set(fnmatch.filter(named, selector))
            known = list(named)
        elif isinstance(selector, type):
            kind = _becomes(selector)
            owners = (m for m in module.modules() if isinstance(m, kind) or issubclass(_becomes(type(m)), kind))
            owned = {id(p) for owner in owners for p in owner.parameters(recurse=False)}
            hits = {name for name, p in named.items() if id(p) in owned}
            known = sorted({type(m).__name__ for m in module.modules()})
        else:
            found |= {name for name, p in named.items() if not is_lazy(p) and selector(name, p)}
            continue
        if required and not hits:
            text = selector if isinstance(selector, str) else selector.__name__
            near = nearest_pattern(text, known) if isinstance(selector, str) else nearest(text, known)
            kinds = "parameters" if isinstance(selector, str) else "modules"
            raise ValueError(
                f"`{argument}={text!r}` matches no parameter of {type(module).__name__}{near or '.'} Its {kinds}:"
                f" {shown(known)}"
            )
        found |= hits
    return found


def _becomes(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a lazy class's modules after their first forward pass; any other class itself."""
    return (issubclass(kind, LazyModuleMixin) and kind.cls_to_become) or kind


class Selection:
    """Parameters that :func:`select` chooses, chosen again when lazy parameters have their shapes.

    :meth:`follow` also chooses again when an optimizer has new parameters.

    Args:
        module: The model.
        on: As in :func:`select`.
        exclude: As in :func:`select`.

    Raises:
        ValueError: If a glob or a class matches nothing.

    Example::

        >>> import torch
        >>> model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
        >>> selection = Selection(model)
        >>> len(selection.ids), len(model(torch.zeros(1, 2))), len(selection.ids)
        (1, 1, 2)
    """

    def __init__(
        self,
        module: nn.Module,
        on: Selectors = None,
        exclude: Selectors = None,
    ) -> None:
        self._module, self._on, self._exclude = module, on, exclude
        self._foreign: dict[int, Tensor] = {}  # held by optimizers, but not by the module
        self._choose(required=True)

    def _choose(self, required: bool = False) -> None:
        # In the middle of a run a model may have lost the parameters that a glob matched at its start.
        chosen = select(self._module, self._on, self._exclude, required=required)
        # Held, so that no `id` is used again.
        self._seen = {id(parameter): parameter for parameter in self._module.parameters()}
        self._known = self._seen.keys() | self._foreign.keys()
        self._waiting = [parameter for parameter in self._module.parameters() if is_lazy(parameter)]
        self._ids = {id(parameter) for parameter in chosen.values()}
        self._existing = self._ids - {id(parameter) for parameter in self._waiting}

    def follow(self, parameters: Sequence[Tensor]) -> bool:
        """Choose again if some of an optimizer's parameters are new to the module, such as those of a replaced head.

        Returns:
            True if it has chosen again.
        """
        if self._known.issuperset(map(id, parameters)):
            return False
        reshard_(self._module)
        self._choose()
        self._foreign |= {id(tensor): tensor for tensor in parameters if id(tensor) not in self._known}
        self._known |= self._foreign.keys()
        return True

    @property
    def ids(self) -> set[int]:
        """The ``id`` of each chosen parameter."""
        self._renew()
        return self._ids

    @property
    def existing(self) -> set[int]:
        """The ``id`` of each chosen parameter that has a shape."""
        self._renew()
        return self._existing

    def _renew(self) -> None:
        if self._waiting and not all(map(is_lazy, self._waiting)):
            self._choose()
