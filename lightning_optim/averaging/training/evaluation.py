"""An average in use: in validation, in files, in the user's hands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from lightning_optim.averaging.batchnorm.refresh import BatchNormRefresh, data_group, in_training
from lightning_optim.averaging.training import pruning
from lightning_optim.averaging.training.averaged_weights import AveragedWeights, raw_weights_in
from lightning_optim.averaging.training.buffer_plan import BufferModes
from lightning_optim.averaging.training.comparison import Comparison
from lightning_optim.base import module_tensors, shards
from lightning_optim.base.layer_classes import BatchNormBase
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.runtime import checkpoint_state
from lightning_optim.runtime.lightning import Callback, LightningModule, Trainer, rank_zero_warn
from lightning_optim.runtime.patching import patched
from lightning_optim.runtime.refusals import nested_averages
from lightning_optim.runtime.spawned_processes import check_weights_are_here
from lightning_optim.runtime.validation import validate


class AveragedEvaluation(BatchNormRefresh):
    """How :class:`WeightAveraging` puts its average to use; when it is updated is said there.

    Attributes:
        buffers: What becomes of floating-point buffers, of all or by name.
        comparison: The metrics of raw and averaged weights, where both are validated.
    """

    buffers: BufferModes
    compare: bool
    comparison: Comparison
    _averaged: AveragedWeights | None
    _layers: list[BatchNormBase]  # whose statistics are estimated anew
    _held: dict[str, Tensor]  # the average, in a copy of a callback
    _unfrozen: list[BatchNormBase] | None  # at the last update, so that an estimate does not depend on when it is made

    @property
    def started(self) -> bool:
        """Whether there is an average that could be used."""
        return bool(self._held) if self._averaged is None else self._averaged.started

    @contextlib.contextmanager
    def averaged_weights(self, module: nn.Module) -> Iterator[None]:
        """Within this, ``module`` holds the averaged weights, if there are any; afterwards the raw ones again.

        Args:
            module: The module that is or was trained, or another one with the same names, such as a copy.

        Raises:
            RuntimeError: If the fit ran in other processes (``ddp_spawn``), in which the average stayed.
            MisconfigurationException: If ``module`` is being trained and holds another callback's average now, as
                within a validation with that one: put this average into a copy of the module.
        """
        self._check_is_here()
        average = self._averaged
        if average is None:
            with _copied_into(module, self._held):
                yield
        elif not average.started or (module is average.module and average.inside):
            yield
        elif module is not average.module:
            if average.module is not None:
                average.estimate_()
            with _copied_into(module, average.named()):
                yield
        else:
            if average.holder is not None and not average.holder.left:
                raise nested_averages(self)
            self._agree()
            with raw_weights_in(module), average.exchanged():
                self._refresh()
                yield

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the average is ready for use: buffers agree over ranks, statistics are of these weights."""
        if self.started and self._averaged is not None and not self.session.failed:  # other ranks may not have failed
            self._agree()
            self._averaged.estimate_()
            if self._stale:
                with self.averaged_weights(pl_module):
                    pass

    @property
    def _stale(self) -> bool:
        return bool(self._layers) and self._averaged is not None and not self._averaged.fresh

    def _agree(self) -> None:
        if self.fit is not None and self.fit.collectives_allowed and self._averaged is not None:
            group = data_group(self.fit.trainer)
            if group is not None:
                self._averaged.agree(group)

    def _refresh(self) -> None:
        shadow = self._averaged
        if self.fit is None or self.fit.failed or shadow is None or not self._stale:
            return
        trainer = self.fit.trainer
        pl_module = trainer.lightning_module
        now = in_training(self._layers) if pl_module.training else self._layers
        layers = now if self._unfrozen is None else self._unfrozen
        self.estimate_statistics_(trainer, pl_module, seed=shadow.updates, layers=layers, write=shadow.take_statistics)
        shadow.fresh = True

    @property
    def _saved_as_state_dict(self) -> bool:
        """Whether it is this average that a file written now holds as ``state_dict``."""
        evaluated = self.fit and self.fit.average
        return evaluated is self or (evaluated is None and self._averaged is not None and self._averaged.inside)

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """The averaged tensors by name; empty before the first update."""
        self._check_is_here()
        return self._held if self._averaged is None else self._averaged.named()

    def _check_is_here(self) -> None:
        if self._averaged is not None and self._averaged.lost:
            rank_zero_warn(
                f"The module held the average of this {type(self).__name__} when the fit ended, and its weights have"
                " been written to since: the average is lost. Read it out of a checkpoint of that fit with"
                " `averaged_state_dict(path)`, or copy the module before you train it on."
            )
        remedy = (
            "Pass `apply_at_end=True`, with which the module ends with it, or read it out of a checkpoint of that fit"
            " with `averaged_state_dict(path)`."
        )
        check_weights_are_here(self, "the average", remedy)

    def _evaluating(self, run: Callable[[], Any], trainer: Trainer, pl_module: LightningModule) -> Callable[[], Any]:
        """The validation loop, with the average in the module from its first hook to its last."""

        def evaluate() -> Any:
            if self.session.average is not self:
                return run()
            raw = validate(trainer, run) if self.compare and self.started else {}
            if self.started:
                _share_raw_buffers(trainer)
            with contextlib.ExitStack() as during:
                during.enter_context(self.averaged_weights(pl_module))
                if raw:
                    during.enter_context(self.comparison.adding(trainer, self.steps, raw))
                result = run()
            # Without an average a validation would have left this behind, and it is what is pruned further.
            pruning.apply_masks_(pl_module)
            return result

        return evaluate

    def _saving(self, save: Callable[..., None], trainer: Trainer, pl_module: LightningModule) -> Callable[..., None]:
        """``trainer.save_checkpoint``, with the average in the module from its first line to its last.

        What a callback or the module saves by itself in ``on_save_checkpoint`` are then the weights that were
        validated, as in the file. The state of a callback is asked for before, beside the raw weights.
        """

        def save_checkpoint(filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
            shadow = self._averaged
            if self.session.average is not self or shadow is None or not shadow.started:
                return save(filepath, weights_only, storage_options)
            with contextlib.ExitStack() as saving:
                saving.enter_context(raw_weights_in(pl_module))
                if not weights_only:
                    exchanged = shards.local_shards(source.tensor for source, _ in shadow.pairs())
                    saving.enter_context(_states_of_now(trainer, exchanged))
                saving.enter_context(self.averaged_weights(pl_module))
                save(filepath, weights_only, storage_options)

        return save_checkpoint

    def _dumping(
        self, state_dict: Callable[[], dict[str, Any]], trainer: Trainer, pl_module: LightningModule
    ) -> Callable[[], dict[str, Any]]:
        """Return a ``state_dict`` with the average, for checkpoints that are made but not saved by the Trainer."""

        def dump() -> dict[str, Any]:
            if self.session.average is not self or self._averaged is None or self._averaged.inside:
                return state_dict()
            self._settle(trainer, pl_module)
            saved = state_dict()
            for source, raw, averaged in self._averaged.located():
                value = averaged.to(raw.dtype)
                if isinstance(value, DTensor):  # of a sharded model: whole tensors on rank 0, or each rank's shard
                    value = value.cpu() if checkpoint_state.is_distributed(trainer) else value.full_tensor().cpu()
                for name in source.names:
                    name = name if name in saved else plain_name(name)
                    if name in saved:
                        saved[name] = value
            return saved

        return dump

    def _install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let validation and files use the average from its start on."""
        session, loop, strategy = self.session, trainer.fit_loop.epoch_loop.val_loop, trainer.strategy
        session.average = self
        session.patch(loop, "run", self._evaluating(loop.run, trainer, pl_module))
        session.patch(trainer, "save_checkpoint", self._saving(trainer.save_checkpoint, trainer, pl_module))
        dumping = self._dumping(strategy.lightning_module_state_dict, trainer, pl_module)
        session.patch(strategy, "lightning_module_state_dict", dumping)

    def state_dict(self) -> dict[str, Any]:
        self._agree()
        return super().state_dict()

    def rank_state(self) -> dict[str, Tensor]:
        return {} if self._averaged is None else self._averaged.of_rank()

    def displaced(self) -> dict[str, Tensor]:
        inside = self._averaged is not None and self._averaged.inside
        return {plain_name(name): raw for name, raw in self._averaged.raw().items()} if inside else {}  # type: ignore[union-attr]


def _share_raw_buffers(trainer: Trainer) -> None:
    """Broadcast rank 0's buffers if DDP is about to: it does so at the first forward after a backward.

    Within a validation of the average it would not find the raw ones.
    """
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel) and model._check_sync_bufs_pre_fwd():  # type: ignore[no-untyped-call]
        model._sync_buffers()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _states_of_now(trainer: Trainer, exchanged: list[Tensor]) -> Iterator[None]:
    """Context manager: the ``state_dict`` of each callback returns what it returns now.

    Averages are left out: they know where raw and averaged weights lie, and return storage that is exchanged as well.
    Of the others' states, storage of the module that will be exchanged is copied.
    """
    live = {tensor.untyped_storage().data_ptr() for tensor in exchanged}

    def copied(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:  # a sparse gradient of an open window, say: it has no storage
            return tensor
        (shard,) = shards.local_shards([tensor])
        return tensor.detach().clone() if shard.untyped_storage().data_ptr() in live else tensor

    with contextlib.ExitStack() as back:
        for callback in trainer.callbacks:
            own = "state_dict" in vars(callback) or type(callback).state_dict is not Callback.state_dict
            if own and not isinstance(callback, AveragedEvaluation):
                kept = tree_map_only(Tensor, copied, callback.state_dict())
                back.enter_context(patched(callback, "state_dict", lambda kept=kept: kept))
        yield


@contextlib.contextmanager
def _copied_into(module: nn.Module, averaged: dict[str, Tensor]) -> Iterator[None]:
    """Context manager: a module with the names of ``averaged``, compiled or not, holds these weights."""
    averaged = {plain_name(name): average for name, average in averaged.items()}
    named = {plain_name(name): tensor for name, tensor in module_tensors.named_tensors(module).items()}
    live = {name: tensor for name, tensor in named.items() if name in averaged}
    if missing := sorted(averaged.keys() - live.keys()):
        raise ValueError(f"{type(module).__name__} has no {missing[:3]}, of which there are averages")
    raw = {name: tensor.detach().clone() for name, tensor in live.items()}
    try:
        for name, tensor in live.items():
            shards.copy_(tensor, averaged[name])
        yield
    finally:
        for name, tensor in live.items():
            shards.copy_(tensor, raw[name])
