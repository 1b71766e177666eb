"""Undo the rounding of weights that Lightning restores from a checkpoint, and warn of buffers that it loses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_optim.base import module_tensors
from lightning_optim.base.module_registry import buffer_of, is_persistent
from lightning_optim.runtime import callback_state
from lightning_optim.runtime.lightning import ModelParallelStrategy, Trainer, rank_zero_warn
from lightning_optim.runtime.lightning.strategies import broadcasts_buffers


class RestoredWeights:
    """Follow the module's weights and buffers from ``setup`` to the first step, and load again what was rounded.

    Lightning restores weights before it converts the module: with ``precision="64-true"`` it loads fp64 values into the
    fp32 weights that the module's constructor made. And its checkpoints hold the buffers of one rank.

    Args:
        trainer: A Trainer in ``setup``.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._rounded: dict[str, Any] = {}
        self._changed: list[str] = []
        self._loaded = False
        late = trainer.strategy.restore_checkpoint_after_setup
        self._made: dict[str, Any] = {} if late else _buffers_of_ranks(trainer)

    def start(self) -> None:
        """Load rounded weights again at ``on_fit_start``, when the module is converted."""
        self._load_again()
        if self._trainer.strategy.restore_checkpoint_after_setup:
            self._made = _buffers_of_ranks(self._trainer)

    def loaded(self, checkpoint: dict[str, Any]) -> None:
        """Keep weights that the module rounds, and note which buffers change, at ``on_load_checkpoint``.

        Each callback calls it; the first call counts, since a callback may write weights of its own after it.
        """
        if self._loaded:
            return
        self._loaded = True
        if saved := checkpoint.get("state_dict"):
            live = module_tensors.named_tensors(self._trainer.lightning_module)
            self._rounded = saved if _rounds(saved, live) else {}
        now = _buffers_of_ranks(self._trainer) if self._made else {}
        self._changed = [name for name, digest in now.items() if self._made.get(name) != digest]

    def begin(self, gathered: bool) -> None:
        """Load rounded weights again at ``on_train_start``, and warn of lost buffers.

        Args:
            gathered: True if a callback brings back the buffers of each rank.
        """
        self._load_again()
        if self._changed and not gathered:
            rank_zero_warn(
                "This resume is not exact: a checkpoint holds the buffers of one rank, and here each rank has its own"
                f" {self._changed}, from its batches. Add `ExactResume()` to the callbacks, also where the checkpoint"
                " is written."
            )
        self._rounded, self._made, self._changed = {}, {}, []

    def _load_again(self) -> None:
        module = self._trainer.lightning_module
        if self._rounded and not _rounds(self._rounded, module_tensors.named_tensors(module)):
            weights, self._rounded = self._rounded, {}
            self._trainer.strategy.load_model_state_dict({"state_dict": weights}, strict=module.strict_loading)


def _rounds(saved: dict[str, Any], live: dict[str, Tensor]) -> bool:
    """Return True if a saved tensor loses bits in the dtype of the module's tensor."""
    both = [(saved[name].dtype, tensor.dtype) for name, tensor in live.items() if isinstance(saved.get(name), Tensor)]
    return any(torch.promote_types(theirs, ours) != ours for theirs, ours in both)


def _buffers_of_ranks(trainer: Trainer) -> dict[str, Any]:
    """Return a digest of each buffer that may differ between ranks."""
    if trainer.world_size == 1 or _shares_buffers(trainer):
        return {}
    return {
        name: callback_state.digest(buffer)
        for name, owner, key in module_tensors.buffer_places(trainer.lightning_module)
        if (buffer := buffer_of(owner, key)) is not None and is_persistent(owner, key) and _may_differ(owner, buffer)
    }


def _shares_buffers(trainer: Trainer) -> bool:
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.device_mesh["data_parallel"].size() == 1
    return broadcasts_buffers(strategy)


def _may_differ(owner: nn.Module, buffer: Tensor) -> bool:
    plain = not isinstance(buffer, DTensor) and not buffer.is_meta and buffer.layout is torch.strided
    return plain and buffer.is_floating_point() and not isinstance(owner, nn.SyncBatchNorm)
