"""Find the places of a model that have dropout or could have it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_optim.base.layer_classes import DropoutBase, RunningNormBase
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.base.suggestions import nearest_pattern, shown


@dataclass(frozen=True)
class Site:
    """Describe a place in a model where values are dropped.

    Attributes:
        name: The module's name.
        module: The module.
        attribute: The attribute that holds the rate; ``None`` if the module has no dropout and its output would get it.
    """

    name: str
    module: nn.Module
    attribute: str | None


def find_sites(model: nn.Module, patterns: Iterable[str], insert: bool = False) -> dict[str, list[Site]]:
    """Find the places that each pattern sets: those that it matches and no pattern before it does.

    Args:
        model: The model.
        patterns: Globs over module names, in the order in which they are tried.
        insert: Also find layers without dropout: every module with weights of its own that a glob matches, and any
            module that a pattern names in full.

    Raises:
        ValueError: If a pattern matches nothing; the message names the nearest one.

    Example::

        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Linear(2, 2))
        >>> sites = find_sites(model, ["1", "*"], insert=True)
        >>> {pattern: [site.name for site in places] for pattern, places in sites.items()}
        {'1': ['1'], '*': ['0', '2']}
    """
    # Attention calls its projection as a function, so a hook on it would never run.
    projections = {id(child) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
    modules = ((name, module) for name, module in model.named_modules() if name and id(module) not in projections)
    named = {plain_name(name): module for name, module in modules}
    found: dict[str, list[Site]] = {}
    set_before: set[int] = set()
    for pattern in patterns:
        matched = {name: named[name] for name in fnmatch.filter(named, pattern)}
        sites = [site for name, module in matched.items() if (site := _site(name, module, pattern, insert))]
        if not sites:
            raise _nothing(pattern, list(matched), named, insert)
        found[pattern] = [site for site in sites if id(site.module) not in set_before]
        set_before |= {id(site.module) for site in sites}
    return found


def _site(name: str, module: nn.Module, pattern: str, insert: bool) -> Site | None:
    attribute = rate_attribute(module)
    if attribute is not None:
        return Site(name, module, attribute)
    return Site(name, module, None) if insert and (is_layer(module) or name == pattern) else None


def is_layer(module: nn.Module) -> bool:
    """Return True if a module has weights of its own with two dimensions or more.

    Weights of a lazy module have no dimensions before its first forward pass: it counts as a layer, unless it
    normalizes.
    """
    lazy_layer = not isinstance(module, RunningNormBase)
    own = module.parameters(recurse=False)
    return any(lazy_layer if is_lazy(parameter) else parameter.ndim >= 2 for parameter in own)


def rate_attribute(module: nn.Module) -> str | None:
    """Return the name of the attribute of ``module`` that holds a dropout rate, or ``None``.

    torch's dropout layers have ``p``, attention and recurrent layers ``dropout``, stochastic depth here and in timm
    ``drop_prob``. Functional dropout with a number in the code of ``forward`` cannot be seen.
    """
    if isinstance(module, DropoutBase):
        return "p"
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return "dropout"
    return "drop_prob" if isinstance(getattr(module, "drop_prob", None), int | float) else None


def _nothing(pattern: str, matched: list[str], named: dict[str, nn.Module], insert: bool) -> ValueError:
    if matched and not insert:
        return ValueError(
            f"`rates[{pattern!r}]` matches {matched[:3]}, which have no dropout: pass `insert=True` to add it to them"
        )
    known = list(named) if insert else [name for name, module in named.items() if rate_attribute(module)]
    which = "modules" if insert else "modules with dropout"
    return ValueError(
        f"`rates[{pattern!r}]` matches no module{' with dropout' if not insert else ''}"
        f"{nearest_pattern(pattern, known) or '.'} The model's {which}: {shown(known)}"
    )
