"""Decide which weights a checkpoint holds as ``state_dict``: those of the evaluated average, with the raw ones beside.

There are two ways to a checkpoint. ``trainer.save_checkpoint`` runs with the average in the module, so that everything
that a callback or the module exports meanwhile is the average too. A checkpoint that is made but not saved
(``dump_checkpoint``) gets the average as a replaced ``state_dict``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.averaging.training import lightning_checkpoints, pruned_parameters
from lightning_optim.averaging.training.averaged_weights import raw_weights_in
from lightning_optim.averaging.training.evaluation import AveragedEvaluation
from lightning_optim.base import shards
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.runtime.lightning import Callback, LightningModule, Trainer
from lightning_optim.runtime.lightning.packages import overrides
from lightning_optim.runtime.lightning.pruning import is_permanent_in_checkpoints
from lightning_optim.runtime.lightning.strategies import writes_folders
from lightning_optim.runtime.lightning.torch_internals import tree_map_only
from lightning_optim.runtime.patching import patched


class AveragedCheckpoints(AveragedEvaluation):
    """Put the average into checkpoints: a part of :class:`WeightAveraging`."""

    @property
    def _saved_as_state_dict(self) -> bool:
        """True if a checkpoint that is written now holds this average as ``state_dict``."""
        evaluated = self.fit and self.fit.average
        return evaluated is self or (evaluated is None and self._averaged is not None and self._averaged.in_model)

    def _use_in_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._use_in_evaluation(trainer, pl_module)
        strategy = trainer.strategy
        self.session.patch(trainer, "save_checkpoint", self._saving(trainer.save_checkpoint, trainer, pl_module))
        dumping = self._dumping(strategy.lightning_module_state_dict, trainer, pl_module)
        self.session.patch(strategy, "lightning_module_state_dict", dumping)

    def _saving(self, save: Callable[..., None], trainer: Trainer, pl_module: LightningModule) -> Callable[..., None]:
        """Return ``trainer.save_checkpoint`` with the average in the module from its first line to its last.

        So a callback or module that saves weights by itself in ``on_save_checkpoint`` saves those that were validated,
        as in the checkpoint. The states of callbacks belong to the raw weights and are taken before.
        """

        def save_checkpoint(filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
            average = self._averaged
            if self.session.average is not self or average is None:
                return save(filepath, weights_only, storage_options)
            with contextlib.ExitStack() as saving:
                saving.enter_context(raw_weights_in(pl_module))
                if average.started and not weights_only:
                    exchanged = shards.local_shards(source.tensor for source, _ in average.pairs())
                    saving.enter_context(_states_of_now(trainer, exchanged))
                saving.enter_context(self.averaged_weights(pl_module))
                save(filepath, weights_only, storage_options)

        return save_checkpoint

    def _dumping(
        self, state_dict: Callable[[], dict[str, Any]], trainer: Trainer, pl_module: LightningModule
    ) -> Callable[[], dict[str, Any]]:
        """Return a function that returns the model's ``state_dict`` with the average in it."""

        def dump() -> dict[str, Any]:
            if self.session.average is not self or self._averaged is None or self._averaged.in_model:
                return state_dict()
            self._make_ready(pl_module)
            saved = state_dict()
            for source, raw, averaged in self._averaged.located():
                value = averaged.to(raw.dtype)
                if isinstance(value, DTensor):  # sharded model: whole tensors on rank 0, or each rank's shard
                    value = value.cpu() if writes_folders(trainer.strategy) else value.full_tensor().cpu()
                for name in source.names:
                    name = name if name in saved else plain_name(name)
                    if name in saved:
                        saved[name] = value
            return saved

        return dump

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._saved_as_state_dict and self._averaged is not None:
            lightning_checkpoints.add_for_lightning(checkpoint, self._averaged, self._permanent_masks())
            lightning_checkpoints.leave_out_as_state_dict(trainer.strategy)

    def _permanent_masks(self) -> dict[str, Tensor]:
        """Return the masks of pruned weights, if a ``ModelPruning`` makes pruning permanent in checkpoints."""
        module = None if self._averaged is None else self._averaged.module
        if module is None or self.fit is None or not any(map(is_permanent_in_checkpoints, self.fit.trainer.callbacks)):
            return {}
        return pruned_parameters.masks_by_name(module)


@contextlib.contextmanager
def _states_of_now(trainer: Trainer, exchanged: list[Tensor]) -> Iterator[None]:
    """Context manager: the ``state_dict`` of each callback returns its present state.

    Averages are left out: they return storage that is exchanged along with the module's. In the states of other
    callbacks, storage of the module that will be exchanged is copied.
    """
    live = {tensor.untyped_storage().data_ptr() for tensor in exchanged}

    def copied(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:  # such as a sparse gradient of an open window, which has no storage
            return tensor
        (shard,) = shards.local_shards([tensor])
        return tensor.detach().clone() if shard.untyped_storage().data_ptr() in live else tensor

    with contextlib.ExitStack() as patches:
        for callback in trainer.callbacks:
            has_state = "state_dict" in vars(callback) or overrides(type(callback), "state_dict", Callback)
            if has_state and not isinstance(callback, AveragedEvaluation):
                state = tree_map_only(Tensor, copied, callback.state_dict())
                patches.enter_context(patched(callback, "state_dict", lambda state=state: state))
        yield
