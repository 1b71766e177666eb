"""Run every validation with the averaged weights, and lend them to the user's own code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from lightning_optim.averaging.batchnorm.refresh import BatchNormRefresh, data_group, in_training
from lightning_optim.averaging.training import pruned_parameters
from lightning_optim.averaging.training.averaged_tensors import by_plain_name
from lightning_optim.averaging.training.averaged_weights import AveragedWeights, average_in, raw_weights_in
from lightning_optim.averaging.training.buffer_plan import BufferModes
from lightning_optim.averaging.training.raw_against_averaged import Comparison
from lightning_optim.base import module_tensors, shards
from lightning_optim.base.layer_classes import BatchNormBase
from lightning_optim.runtime.lightning import LightningModule, Trainer, rank_zero_warn
from lightning_optim.runtime.lightning.strategies import share_buffers_
from lightning_optim.runtime.ran_elsewhere import check_no_copy_ran, check_weights_are_here
from lightning_optim.runtime.refusals import nested_averages
from lightning_optim.runtime.validation import validate


class AveragedEvaluation(BatchNormRefresh):
    """Put the average into the module for validations and for the user: a part of :class:`WeightAveraging`.

    Attributes:
        buffers: Mode of the floating-point buffers, for all of them or by pattern.
        comparison: Metrics of raw and averaged weights, where both are validated.
    """

    buffers: BufferModes
    compare: bool
    comparison: Comparison
    _averaged: AveragedWeights | None
    _layers: list[BatchNormBase]  # their statistics are estimated anew
    _copied: dict[str, Tensor]  # the averaged tensors, in a copy of a callback
    # The layers in training mode at the last update, so that an estimate does not depend on when it is made.
    _unfrozen: list[BatchNormBase] | None

    @property
    def started(self) -> bool:
        """True if the average has been updated at least once."""
        return bool(self._copied) if self._averaged is None else self._averaged.started

    @contextlib.contextmanager
    def averaged_weights(self, module: nn.Module) -> Iterator[None]:
        """Context manager: ``module`` holds the averaged weights; afterwards it holds its raw weights again.

        Before the first update it is a no-op.

        Args:
            module: The module that is or was trained, or another one with the same parameter names, such as a copy.

        Raises:
            RuntimeError: If the fit ran in other processes (``ddp_spawn``), where the average stayed, or in a copy of
                this callback, as where a package copies the Trainer.
            MisconfigurationException: If ``module`` is in training and holds the average of another callback, as it
                does during a validation with ``evaluate=True``. Pass a copy of the module instead.

        Example::

            with callback.averaged_weights(pl_module):
                torch.onnx.export(pl_module, example, "model.onnx")
        """
        self._check_is_here()
        average = self._averaged
        if average is None:
            with _copied_into(module, self._copied):
                yield
        elif not average.started or (module is average.module and average.in_model):
            yield
        elif module is not average.module:
            if average.module is not None:
                average.estimate_()
            with _copied_into(module, average.named()):
                yield
        else:
            if (other := average_in(module)) is not None and not other.left_in_model:
                raise nested_averages(self)
            self._reduce_over_ranks()
            with raw_weights_in(module), average.exchanged():
                self._refresh_batchnorm()
                yield

    def averaged_state(self) -> dict[str, Tensor]:
        """Return the averaged tensors by their names in the model's ``state_dict``; empty before the first update."""
        self._check_is_here()
        return self._copied if self._averaged is None else self._averaged.named()

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
        if not self.started:
            check_no_copy_ran(self)

    # ---- buffers and statistics that belong to the averaged weights --------------------------------------------------

    def _make_ready(self, pl_module: LightningModule) -> None:
        """Compute all that a use of the present average needs: buffers over ranks, vectors, BatchNorm statistics."""
        # Not after an exception: the other ranks may still be training, and would not answer.
        if self.started and self._averaged is not None and not self.session.failed:
            self._reduce_over_ranks()
            self._averaged.estimate_()
            if self._needs_refresh:
                with raw_weights_in(pl_module), self.averaged_weights(pl_module):
                    pass

    def _reduce_over_ranks(self) -> None:
        if self.fit is not None and self.fit.collectives_allowed and self._averaged is not None:
            group = data_group(self.fit.trainer)
            if group is not None:
                self._averaged.reduce_buffers(group)

    @property
    def _needs_refresh(self) -> bool:
        return bool(self._layers) and self._averaged is not None and not self._averaged.fresh

    def _refresh_batchnorm(self) -> None:
        average = self._averaged
        if self.fit is None or self.fit.failed or average is None or not self._needs_refresh:
            return
        trainer = self.fit.trainer
        pl_module = trainer.lightning_module
        now = in_training(self._layers) if pl_module.training else self._layers
        layers = now if self._unfrozen is None else self._unfrozen
        self.estimate_statistics_(trainer, pl_module, average.updates, layers, write=average.set_statistics_)
        average.fresh = True

    # ---- validation --------------------------------------------------------------------------------------------------

    def _use_in_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let each validation of this fit use the average, from its first update on."""
        self.session.average = self
        loop = trainer.fit_loop.epoch_loop.val_loop
        self.session.patch(loop, "run", self._validating(loop.run, trainer, pl_module))

    def _validating(self, run: Callable[[], Any], trainer: Trainer, pl_module: LightningModule) -> Callable[[], Any]:
        """Return the validation loop ``run``, with the average in the module from its first hook to its last."""

        def evaluate() -> Any:
            if self.session.average is not self:
                return run()
            raw = validate(trainer, run) if self.compare and self.started else {}
            if self.started:
                share_buffers_(trainer)  # the raw ones, as DDP would; during the validation they are not in the module
            with contextlib.ExitStack() as during:
                during.enter_context(self.averaged_weights(pl_module))
                if raw:
                    during.enter_context(self.comparison.adding(trainer, self.steps, raw))
                result = run()
            # A validation without an average leaves products of raw weights and masks, from which pruning goes on.
            pruned_parameters.apply_masks_(pl_module)
            return result

        return evaluate

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._reduce_over_ranks()
        return super().state_dict()

    def rank_state(self) -> dict[str, Tensor]:
        return {} if self._averaged is None else self._averaged.of_rank()

    def displaced(self) -> dict[str, Tensor]:
        average = self._averaged
        if average is None or not average.in_model:
            return {}
        return by_plain_name(average.raw())


@contextlib.contextmanager
def _copied_into(module: nn.Module, averaged: dict[str, Tensor]) -> Iterator[None]:
    """Context manager: ``module``, compiled or not, holds a copy of the tensors of these names."""
    averaged, named = by_plain_name(averaged), by_plain_name(module_tensors.named_tensors(module))
    live = {name: tensor for name, tensor in named.items() if name in averaged}
    if missing := sorted(averaged.keys() - live.keys()):
        raise ValueError(
            f"`module` must have the parameters of the averaged module, and this {type(module).__name__} has no"
            f" {missing[:3]}"
        )
    raw = {name: tensor.detach().clone() for name, tensor in live.items()}
    try:
        for name, tensor in live.items():
            shards.copy_(tensor, averaged[name])
        yield
    finally:
        for name, tensor in live.items():
            shards.copy_(tensor, raw[name])
