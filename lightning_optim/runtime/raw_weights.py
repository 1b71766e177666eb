"""Keep the raw weights of a module whose fit ended with other weights in it, so that training can resume from them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_optim.base import module_tensors, shards
from lightning_optim.runtime.cpu_copies import copy_to_cpu, from_checkpoint, matching_names, swap_, with_local_shards
from lightning_optim.runtime.interrupts import uninterrupted


class RawWeights:
    """Keep the raw weights on the CPU while the trained module holds the better weights that its fit ended with.

    The optimizers' state belongs to the raw weights. A checkpoint that is written then needs both: the weights in the
    module are its ``state_dict``, and the raw weights are in :meth:`extra_state`. A second fit without a checkpoint
    forgets them, and goes on from the weights in the module with new optimizers.

    Attributes:
        displaced: The raw weights by plain name, while the module holds other weights.
    """

    def __init__(self) -> None:
        self._in_module = False  # True while the module holds the other weights
        self._module: weakref.ref[nn.Module] | None = None  # the trained module
        self._raw: dict[str, Tensor] = {}

    def is_of(self, module: nn.Module) -> bool:
        """Return True if ``module`` is the one that was trained."""
        return self._module is not None and self._module() is module

    @torch.no_grad()
    def keep_raw(self, module: nn.Module) -> None:
        """Copy the raw weights before other weights are put in."""
        shards.reshard_(module)
        live = module_tensors.writable_tensors(module)
        self._raw, self._module, self._in_module = copy_to_cpu(live, live, {}), weakref.ref(module), True

    @torch.no_grad()
    def resume_(self, module: nn.Module) -> None:
        """Put the raw weights in when training starts, if the checkpoint was written while other weights were in."""
        shards.reshard_(module)
        self._module, live = weakref.ref(module), module_tensors.writable_tensors(module)
        if self._in_module:
            self._raw = with_local_shards(self._raw, live)
            with uninterrupted():
                self._put_raw_in_(live)
            self._in_module, self._raw = False, {}

    def _put_raw_in_(self, live: dict[str, Tensor]) -> None:
        """Put the raw weights into the module's tensors, which hold the other weights."""
        swap_(live, {name: self._raw[name] for name in matching_names(live, self._raw)})

    def extra_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint; of a sharded module with DTensors."""
        return {"in_module": True, "raw": self._sharded(self._raw)} if self._in_module else {}

    @property
    def displaced(self) -> dict[str, Tensor]:
        return self._raw if self._in_module else {}

    def rank_state(self) -> dict[str, Tensor]:
        """Return the tensors of :meth:`extra_state` in which ranks differ, by path: buffers, which are not sharded."""
        return self._buffers_of("raw", self.displaced)

    def _buffers_of(self, part: str, copies: dict[str, Tensor]) -> dict[str, Tensor]:
        module = self._module() if self._module is not None else None
        if module is None or not copies:
            return {}
        live = module_tensors.writable_tensors(module)
        buffers = {name for name, tensor in live.items() if not isinstance(tensor, nn.Parameter | DTensor)}
        return {f"{part}/{name}": copy for name, copy in copies.items() if name in buffers}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take over what :meth:`extra_state` returned."""
        self._in_module, self._raw = extra.get("in_module", False), from_checkpoint(extra.get("raw", {}))

    def _sharded(self, copies: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of a sharded module's shards as DTensors."""
        module = self._module() if self._module is not None else None
        if module is None or not copies:
            return dict(copies)
        shards.reshard_(module)
        live, sharded = module_tensors.writable_tensors(module), {}
        for name, copy in copies.items():
            like = live.get(name, copy)
            (shard,) = shards.local_shards([like])
            is_shard = like is not shard and copy.shape == shard.shape
            sharded[name] = shards.placed_as(copy.to(shard.device), like) if is_shard else copy
        return sharded

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the module, which a copy does not hold."""
        return {**self.__dict__, "_module": None}
