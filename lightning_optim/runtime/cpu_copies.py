"""Copy a module's tensors to the CPU by name, and swap the copies with the module's tensors in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_optim.base import foreach, module_tensors, shards


def copy_to_cpu(
    live: Mapping[str, Tensor], values: Mapping[str, Tensor], old: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copy values of a module's tensors to the CPU; of sharded tensors this process's shard.

    Args:
        live: The module's tensors. A copy has their dtype, and tied ones get one copy.
        values: The values by the same names. Where a name is missing, the module's own value is copied.
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


def from_checkpoint(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint on the CPU, by plain name; of sharded ones this process's shards."""
    return {module_tensors.plain_name(name): shards.local_shards([tensor])[0].cpu() for name, tensor in saved.items()}


def matching_names(live: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose copy has the shape of the module's tensor, or of this process's shard of it."""
    return [
        name
        for name, copy in copies.items()
        if name in live and copy.shape in (live[name].shape, shards.local_shards([live[name]])[0].shape)
    ]


def with_local_shards(copies: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace copies of whole tensors, which a checkpoint may hold, by this process's shards of them."""
    found = {}
    for name, copy in copies.items():
        like = live.get(name, copy)
        (shard,) = shards.local_shards([like])
        is_whole = like is not shard and copy.shape == like.shape and copy.shape != shard.shape
        found[name] = shards.shard_of(copy.to(shard.device), like).cpu().clone() if is_whole else copy
    return found


@torch.no_grad()
def swap_(live: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Swap the values of the module's tensors and of their copies, in place; return what the module held."""
    held: dict[str, Tensor] = {}
    done: dict[int, str] = {}
    places: dict[int, Tensor] = {}
    for name, copy in copies.items():
        (shard,) = shards.local_shards([live[name]])
        if id(live[name]) in done:  # tied
            held[name] = held[done[id(live[name])]]
            continue
        done[id(live[name])] = name
        if copy.numel() and copy.data_ptr() in places:  # tied when it was copied, and no longer
            held[name] = shard.detach().to("cpu", copy=True)
            shard.copy_(places[copy.data_ptr()])
            continue
        places[copy.data_ptr()] = shard
        if copy.dtype == shard.dtype:
            foreach.swap_(shard, copy)
            held[name] = copy
        else:
            held[name] = shard.detach().to("cpu", copy=True)
            shard.copy_(copy)
    return held
