"""Weights that were kept, and a module that has changed since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lightning_optim.base import module_tensors


def folded(held: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the held tensors for a module whose pruning was made permanent since: weights times their masks."""
    names = {name.removesuffix("_orig") for name in held if name.endswith("_orig") and name not in live}
    pruned = {name for name in names if name in live and f"{name}_mask" in held}
    products = {name: held[f"{name}_orig"] * held[f"{name}_mask"] for name in pruned}
    parts = {f"{name}{part}" for name in pruned for part in ("_orig", "_mask")}
    return {name: kept for name, kept in held.items() if name not in parts} | products


def misfits(live: Mapping[str, Tensor], module: nn.Module, held: Iterable[str], fits: Iterable[str]) -> str:
    """Say which held tensors do not fit a module that has changed, and which of it are not held; empty if none.

    Frozen tensors need not be held.
    """
    held, named = set(held), {module_tensors.plain_name(name) for name in module_tensors.named_tensors(module)}
    parts = {
        "the module has no longer": held - named,
        "the best check had no": live.keys() - held - module_tensors.frozen_names(module),
        "of another shape by now:": (held & live.keys()) - set(fits),
    }
    return "; ".join(f"{what} {listed(names)}" for what, names in parts.items() if names)


def listed(names: Iterable[str]) -> str:
    """Return the names in a list, of many the first."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return f"{ordered[:8]}{more}"
