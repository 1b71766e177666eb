"""Find the places of a model that have dropout or could have it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_optim.base.layer_classes import DropoutBase, RunningNormBase
from lightning_optim.base.module_selection import uncalled_modules
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.base.suggestions import nearest_pattern, shown
from lightning_optim.regularization.dropout.weight_drop import WeightDrop, weights_of

Insert = bool | Literal["block", "weight"]


@dataclass(frozen=True)
class Site:
    """Describe a place in a model where values are dropped.

    Attributes:
        name: The module's name.
        module: The module.
        attribute: The attribute that holds the rate; ``None`` if the module has no dropout and would get it.
    """

    name: str
    module: nn.Module
    attribute: str | None


@dataclass(frozen=True)
class Sites:
    """Hold the places that a pattern sets.

    Attributes:
        sites: The places.
        left_out: The name of the model's last layer if the pattern matches it and does not take it; else "".
    """

    sites: list[Site]
    left_out: str = ""


def find_sites(
    model: nn.Module, patterns: Iterable[str], insert: Insert = False, strict: bool = True
) -> dict[str, Sites]:
    """Find the places that each pattern sets: those that it matches and no pattern before it does.

    Args:
        model: The model.
        patterns: Globs over module names, in the order in which they are tried.
        insert: Also find layers without dropout: every module that a glob matches and that can have it, and any
            module that a pattern names in full. A glob does not take the model's last layer, whose outputs are the
            model's, if it matches anything else; ``"weight"`` does, since it drops no outputs.
        strict: Raise if a pattern matches nothing.

    Raises:
        ValueError: If a pattern matches nothing; the message names the nearest one.

    Example::

        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Linear(2, 2))
        >>> found = find_sites(model, ["1", "*"], insert=True)
        >>> {pattern: [site.name for site in one.sites] for pattern, one in found.items()}, found["*"].left_out
        ({'1': ['1'], '*': ['0']}, '2')
    """
    owned = uncalled_modules(model)
    if insert == "weight":
        owned |= {id(module.module) for module in model.modules() if isinstance(module, WeightDrop)}
    modules = ((name, module) for name, module in model.named_modules() if name and id(module) not in owned)
    # Of a compiled module and the one in it, which share a name, the inner one has the rate.
    named = {plain_name(name).removesuffix("._orig_mod"): module for name, module in modules}
    last = next((name for name, module in reversed(named.items()) if insert != "weight" and is_layer(module)), "")
    found: dict[str, Sites] = {}
    set_before: set[int] = set()
    for pattern in patterns:
        matched = {name: named[name] for name in fnmatch.filter(named, pattern)}
        sites = [site for name, module in matched.items() if (site := _site(name, module, pattern, insert))]
        if not sites and strict:
            raise _nothing(pattern, list(matched), named, insert)
        inner = [site for site in sites if site.attribute is not None or site.name != last or site.name == pattern]
        if not inner:  # the last layer is all that the pattern matches
            inner = sites
        left_out = last if len(inner) < len(sites) and id(named[last]) not in set_before else ""
        found[pattern] = Sites([site for site in inner if id(site.module) not in set_before], left_out)
        set_before |= {id(site.module) for site in inner}
    return found


def _site(name: str, module: nn.Module, pattern: str, insert: Insert) -> Site | None:
    attribute = rate_attribute(module)
    if attribute is not None and not (insert == "weight" and isinstance(module, nn.RNNBase)):
        return Site(name, module, attribute)
    if insert == "weight":
        return Site(name, module, None) if _has_weights_to_drop(module) else None
    takes = isinstance(module, nn.Conv2d | nn.ConvTranspose2d) if insert == "block" else insert and is_layer(module)
    return Site(name, module, None) if takes or (insert and name == pattern) else None


def is_layer(module: nn.Module) -> bool:
    """Return True if a module has weights of its own with two dimensions or more, also by a parametrization.

    Weights of a lazy module have no dimensions before its first forward pass: it counts as a layer, unless it
    normalizes.
    """
    lazy_layer = not isinstance(module, RunningNormBase)
    own = list(module.parameters(recurse=False))
    if is_parametrized(module) and isinstance(module.parametrizations, nn.Module):
        own += module.parametrizations.parameters()
    return any(lazy_layer if is_lazy(parameter) else parameter.ndim >= 2 for parameter in own)


def _has_weights_to_drop(module: nn.Module) -> bool:
    """Return True if a module has weights that can be dropped. What a parametrization computes cannot."""
    waits = any(is_lazy(parameter) for parameter in module.parameters(recurse=False))
    return is_layer(module) and (waits or bool(weights_of(module)))


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


def _nothing(pattern: str, matched: list[str], named: dict[str, nn.Module], insert: Insert) -> ValueError:
    if matched and not insert:
        return ValueError(
            f"`rates[{pattern!r}]` matches {matched[:3]}, which have no dropout: pass `insert=True` to add it to them"
        )
    if matched:
        kinds = {
            "block": "convolution of two dimensions",
            "weight": "layer with weights of its own (what a parametrization computes is not dropped)",
        }
        what = kinds.get(str(insert), "layer")
        return ValueError(
            f"`rates[{pattern!r}]` with `insert={insert!r}` matches {matched[:3]}, of which none is a {what}, nor has"
            " dropout of its own"
        )
    known = list(named) if insert else [name for name, module in named.items() if rate_attribute(module)]
    which = "modules" if insert else "modules with dropout"
    return ValueError(
        f"`rates[{pattern!r}]` matches no module{' with dropout' if not insert else ''}"
        f"{nearest_pattern(pattern, known) or '.'} The model's {which}: {shown(known)}"
    )
