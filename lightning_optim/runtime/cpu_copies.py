"""Copies of a module's tensors on the CPU, by name: made, and exchanged with the module's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_optim.base import foreach, shards


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
            shard, value = shards.local_shards([tensor, values.get(name, tensor)])
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
        if name in live and kept.shape in (live[name].shape, shards.local_shards([live[name]])[0].shape)
    ]


def localized(held: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the held tensors with this process's shards in place of whole ones, which come from a file."""
    parts = {}
    for name, kept in held.items():
        like = live.get(name, kept)
        (shard,) = shards.local_shards([like])
        whole = like is not shard and kept.shape == like.shape and kept.shape != shard.shape
        parts[name] = shards.shard_of(kept.to(shard.device), like).cpu().clone() if whole else kept
    return parts


@torch.no_grad()
def exchange_(live: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exchange the module's tensors with held ones that fit, in place; return what the module had."""
    had: dict[str, Tensor] = {}
    done: dict[int, str] = {}
    places: dict[int, Tensor] = {}
    for name, kept in held.items():
        (shard,) = shards.local_shards([live[name]])
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
            foreach.swap_(shard, kept)
            had[name] = kept
        else:
            had[name] = shard.detach().to("cpu", copy=True)
            shard.copy_(kept)
    return had
