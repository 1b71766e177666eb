"""The raw weights of a module that ended a fit with others, from which training resumes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_optim.base import module_tensors, shards
from lightning_optim.runtime.cpu_copies import copies_of, exchange_, fitting, localized
from lightning_optim.runtime.interrupts import uninterrupted


class Displaced:
    """Raw weights on the CPU, while the trained module holds better ones that were put in when its fit ended.

    The optimizers' state belongs to the raw weights. A checkpoint that is written then needs both sets: the module's
    is its ``state_dict``, and the raw one is in :meth:`extra_state`. A second fit without a checkpoint forgets it, and
    goes on from the module's weights with new optimizers.
    """

    def __init__(self) -> None:
        self._in_module = False  # whether the module holds the others now
        self._module: weakref.ref[nn.Module] | None = None  # the trained one
        self._raw: dict[str, Tensor] = {}

    def is_of(self, module: nn.Module) -> bool:
        """Return whether ``module`` is the one that was trained."""
        return self._module is not None and self._module() is module

    @torch.no_grad()
    def keep_raw(self, module: nn.Module) -> None:
        """Copy the raw weights before others are put in."""
        shards.reshard_(module)
        live = module_tensors.writable_tensors(module)
        self._raw, self._module, self._in_module = copies_of(live, live, {}), weakref.ref(module), True

    @torch.no_grad()
    def resume_(self, module: nn.Module) -> None:
        """When training starts: put the raw weights in, if the checkpoint was written when the module held others."""
        shards.reshard_(module)
        self._module, live = weakref.ref(module), module_tensors.writable_tensors(module)
        if self._in_module:
            self._raw = localized(self._raw, live)
            with uninterrupted():
                self._take_(live)
            self._in_module, self._raw = False, {}

    def _take_(self, live: dict[str, Tensor]) -> None:
        """Put the raw weights into the module's tensors, which hold the others."""
        exchange_(live, {name: self._raw[name] for name in fitting(live, self._raw)})

    def extra_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint; DTensors for a sharded module."""
        return {"in_module": True, "raw": self._placed(self._raw)} if self._in_module else {}

    @property
    def displaced(self) -> dict[str, Tensor]:
        """The raw weights, by plain name, while the module holds others."""
        return self._raw if self._in_module else {}

    def rank_state(self) -> dict[str, Tensor]:
        """Return the tensors of :meth:`extra_state` in which ranks differ, by path: buffers, which are not sharded."""
        return self._of_buffers("raw", self.displaced)

    def _of_buffers(self, part: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
        module = self._module() if self._module is not None else None
        if module is None or not held:
            return {}
        live = module_tensors.writable_tensors(module)
        own = {name for name, tensor in live.items() if not isinstance(tensor, nn.Parameter | DTensor)}
        return {f"{part}/{name}": kept for name, kept in held.items() if name in own}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take over what :meth:`extra_state` returned."""
        self._in_module, self._raw = extra.get("in_module", False), on_cpu(extra.get("raw", {}))

    def _placed(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the held shards of a sharded module as DTensors."""
        module = self._module() if self._module is not None else None
        if module is None or not held:
            return dict(held)
        shards.reshard_(module)
        live, placed = module_tensors.writable_tensors(module), {}
        for name, kept in held.items():
            like = live.get(name, kept)
            (shard,) = shards.local_shards([like])
            ours = like is not shard and kept.shape == shard.shape
            placed[name] = shards.placed_as(kept.to(shard.device), like) if ours else kept
        return placed

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds no module."""
        return {**self.__dict__, "_module": None}


def on_cpu(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by plain names, of sharded ones this process's shards."""
    return {module_tensors.plain_name(name): shards.local_shards([kept])[0].cpu() for name, kept in saved.items()}
