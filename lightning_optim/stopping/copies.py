"""Copies of a module's tensors on the CPU, by name: made, exchanged with the module, and fitted to one that changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_optim import tensors


def copies_of(live: Mapping[str, Tensor], values: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the values of a module's tensors to the CPU, of sharded ones this process's shard.

    Args:
        live: The module's tensors; a copy has their dtype, and tied ones get one copy.
        values: What is copied, by the same names; the tensors themselves where there is nothing else.
        old: Earlier copies, whose storage is used again.
    """
    made: dict[int, Tensor] = {}
    copies, used = {}, set()
    for name, tensor in live.items():
        if id(tensor) not in made:
            shard, value = tensors.local([tensor, values.get(name, tensor)])
            copy = old.get(name)
            if copy is None or copy.shape != value.shape or copy.dtype != shard.dtype or id(copy) in used:
                copy = torch.empty_like(value, dtype=shard.dtype, device="cpu", requires_grad=False)
            used.add(id(copy))
            made[id(tensor)] = copy.copy_(value.detach())
        copies[name] = made[id(tensor)]
    return copies


def fitting(live: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> list[str]:
    """Return the names under which a held tensor has the shape of the module's, or of this process's shard of it."""
    return [
        name
        for name, kept in held.items()
        if name in live and kept.shape in (live[name].shape, tensors.local([live[name]])[0].shape)
    ]


def localized(held: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the held tensors with this process's shards in place of whole ones, which come from a file."""
    parts = {}
    for name, kept in held.items():
        like = live.get(name, kept)
        (shard,) = tensors.local([like])
        whole = like is not shard and kept.shape == like.shape and kept.shape != shard.shape
        parts[name] = tensors.part_of(kept.to(shard.device), like).cpu().clone() if whole else kept
    return parts


def folded(held: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the held tensors for a module whose pruning was made permanent since: weights times their masks."""
    names = {name.removesuffix("_orig") for name in held if name.endswith("_orig") and name not in live}
    pruned = {name for name in names if name in live and f"{name}_mask" in held}
    products = {name: held[f"{name}_orig"] * held[f"{name}_mask"] for name in pruned}
    parts = {f"{name}{part}" for name in pruned for part in ("_orig", "_mask")}
    return {name: kept for name, kept in held.items() if name not in parts} | products


@torch.no_grad()
def exchange_(live: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exchange the module's tensors with held ones that fit, in place; return what the module had."""
    had: dict[str, Tensor] = {}
    done: dict[int, str] = {}
    places: dict[int, Tensor] = {}
    for name, kept in held.items():
        (shard,) = tensors.local([live[name]])
        if id(live[name]) in done:  # tied
            had[name] = had[done[id(live[name])]]
            continue
        done[id(live[name])] = name
        if kept.numel() and kept.data_ptr() in places:  # tied when it was kept, and no longer
            had[name] = shard.detach().to("cpu", copy=True)
            shard.copy_(places[kept.data_ptr()])
            continue
        places[kept.data_ptr()] = shard
        if kept.dtype == shard.dtype:
            tensors.exchange_(shard, kept)
            had[name] = kept
        else:
            had[name] = shard.detach().to("cpu", copy=True)
            shard.copy_(kept)
    return had


def misfits(live: Mapping[str, Tensor], module: nn.Module, held: Iterable[str], fits: Iterable[str]) -> str:
    """Say which held tensors do not fit a module that has changed, and which of it are not held; empty if none.

    Frozen tensors need not be held.
    """
    held, named = set(held), {tensors.plain_name(name) for name in tensors.named_tensors(module)}
    parts = {
        "the module has no longer": held - named,
        "the best check had no": live.keys() - held - tensors.frozen_names(module),
        "of another shape by now:": (held & live.keys()) - set(fits),
    }
    return "; ".join(f"{what} {listed(names)}" for what, names in parts.items() if names)


def listed(names: Iterable[str]) -> str:
    """Return the names in a list, of many the first."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return f"{ordered[:8]}{more}"
