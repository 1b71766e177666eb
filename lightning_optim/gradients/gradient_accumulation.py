"""Accumulate the gradients of several micro-batches for each optimizer step."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_optim.base import module_tensors, shards
from lightning_optim.base.dtypes import widest_dtype
from lightning_optim.base.policy import belongs_to
from lightning_optim.base.schedules import Schedule
from lightning_optim.gradients.accumulation_window import (
    WeightBy,
    Window,
    argument_of,
    micro_batches_for,
    name_of,
    unit_of,
    weight_of,
)
from lightning_optim.gradients.manual_optimization import ManualOptimizationMixin
from lightning_optim.gradients.target_batch_size import TargetBatchSize
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.callback_state import from_each_rank
from lightning_optim.runtime.lightning import LightningModule, MisconfigurationException, Trainer, rank_zero_warn
from lightning_optim.runtime.lightning.loops import is_last_batch
from lightning_optim.runtime.lightning.modules import is_overridden
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.overridden_hooks import is_overridden_by_user
from lightning_optim.runtime.step import OptimizerStep

_WINDOWS = 10  # From so many windows whose weights are all 0 on, a logged step warns, and not only the epoch's end.


class GradientAccumulation(OptimCallback):
    r"""Step once in N micro-batches, with the mean of their gradients: :math:`g = \sum_i w_i \nabla L_i / \sum_i w_i`.

    The sums go over the micro-batches of the window: N of them, or fewer in the last window of an epoch (which
    Lightning divides by N too, so that this step is too small). A micro-batch whose ``training_step`` returned ``None``
    is left out. If :math:`w_i` is the number of samples or tokens that :math:`L_i` is the mean of, N micro-batches give
    the step of one batch that holds all of them, for a model without batch statistics and dropout. With all
    :math:`w_i = 1`, the default, they do so if they are of equal size.

    With ``weight_by`` other than ``"batch"`` the sums also go over all ranks, whose weights may differ; this costs two
    reductions of one number in each step. A micro-batch with the weight 0 adds nothing, if its gradient is finite: that
    of ``cross_entropy(..., ignore_index=...)`` is, although the loss is NaN. In a mean of your own, divide by
    ``count.clamp(min=1)`` where a micro-batch may be empty.

    In automatic optimization it takes the place of ``Trainer(accumulate_grad_batches=N)``, which it sets for the length
    of the fit: ``outputs["loss"]`` is the loss divided by N, as with Lightning's argument. In manual optimization the
    module is a :class:`ManualOptimizationMixin` and steps with its ``optimize``. For an int
    ``trainer.estimated_stepping_batches`` is right; for a dictionary use :func:`~lightning_optim.total_steps`.

    A checkpoint that is written within a window holds the window: its gradients of every rank, and its count.
    Lightning loses them.

    Args:
        n: Number of micro-batches in each step, >= 1; or a dictionary from epoch to number, such as ``{0: 8, 10: 4}``
            (1 before the first key), which changes at the start of an epoch, since no window spans two epochs; or a
            :class:`TargetBatchSize`, which computes it.
        weight_by: Weight :math:`w_i` of a micro-batch: ``"batch"``, 1 for each; ``"sample"``, its size; or a function
            of the batch that counts the elements that its loss is the mean of, such as ``lambda batch:
            batch["mask"].sum()`` for tokens. A tensor may stay on its device. In YAML a function is written as
            ``my_package.count_tokens``.
        name: Distinguishes two such callbacks in checkpoints.
        summary: See :class:`OptimCallback`.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: Under manual optimization of a module that is not a
            :class:`ManualOptimizationMixin`, or that steps an optimizer without its ``optimize``; beside
            ``Trainer(accumulate_grad_batches=…)``; or if :class:`TargetBatchSize` cannot find the size of a
            micro-batch.

    Example::

        >>> from lightning_optim import GradientAccumulation
        >>> accumulation = GradientAccumulation({0: 8, 10: 4})
        >>> [accumulation.batches_per_step(epoch) for epoch in (0, 9, 10)]
        [8, 8, 4]

    For a Trainer: ``Trainer(callbacks=[GradientAccumulation(8)])``.
    """

    slot = Slot.ACCUMULATE
    touches = frozenset({"gradients"})

    def __init__(
        self,
        n: int | dict[int, int] | TargetBatchSize,
        weight_by: WeightBy = "batch",
        name: str | None = None,
        summary: bool = True,
    ) -> None:
        super().__init__(name, summary)
        sizes = n if isinstance(n, dict) else {0: 1 if isinstance(n, TargetBatchSize) else n}
        if not sizes or not all(_is_integer(epoch, 0) and _is_integer(size, 1) for epoch, size in sizes.items()):
            instead = belongs_to(n, TargetBatchSize)
            if isinstance(n, Schedule):
                instead = "; write the number from each epoch on, such as `{0: 1, 10: 4}`, in place of a schedule"
            raise ValueError(
                "`n` must be an integer >= 1, a dictionary of epochs >= 0 to such integers, or a TargetBatchSize, got"
                f" {n!r}{instead}"
            )
        if not callable(weight_by) and weight_by not in ("batch", "sample"):
            example = ""
            if "token" in str(weight_by).lower():
                example = " that counts the tokens, such as `lambda batch: (batch['labels'] != -100).sum()`"
            raise ValueError(
                f"`weight_by` must be 'batch', 'sample' or a function of the batch{example}, got {weight_by!r}"
            )
        self.n, self.weight_by = n, weight_by
        self._sizes = dict(sorted(sizes.items()))
        self.reset()

    def batches_per_step(self, epoch: int) -> int:
        return next((size for start, size in reversed(self._sizes.items()) if start <= epoch), 1)

    def reset(self) -> None:
        self._windows: dict[int, Window] = {}
        self._weight: Tensor | None = None
        self._unit: Tensor | None = None
        self._loaded: dict[str, Any] | None = None
        self._largest: int | None = None  # micro-batches that a step of this epoch had, if it was seen from its start
        self._in_batch = False
        self._warned = False
        self._closing: int | None = None  # index of the optimizer that `optimize` steps now
        self._samples: int | None = None  # in a step, if a TargetBatchSize computes it
        # Windows that closed, and whether the weights of any of them were positive; `None` once this was looked at.
        self._closed: int | None = 0
        self._any_weighed: Tensor | None = None

    def describe_step(self, index: int) -> tuple[str, str]:
        words = f"accumulate {self.n if isinstance(self.n, dict) else self.batches_per_step(0)}"
        words += "" if self._samples is None else f" ({self._samples:,} samples)"
        return words + ("" if self.weight_by == "batch" else f", weighted by {name_of(self.weight_by)}"), ""

    # ---- the window --------------------------------------------------------------------------------------------------

    def window(self, trainer: Trainer, index: int) -> Window:
        """Return the open window of an optimizer, or open one."""
        if index not in self._windows:
            self._windows[index] = Window(self.batches_per_step(trainer.current_epoch))
        return self._windows[index]

    @property
    def is_open(self) -> bool:
        """True if the window of any optimizer holds gradients with which no step was taken yet."""
        return any(window.count for window in self._windows.values())

    @contextlib.contextmanager
    def closing(self, index: int) -> Iterator[None]:
        """Context manager: the step of the optimizer with this index is that of its window."""
        self._closing = index
        try:
            yield
        finally:
            self._closing = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if isinstance(self.n, TargetBatchSize):
            self._resolve_when_loaded(self.n, trainer, pl_module)
        if pl_module.automatic_optimization:
            self.session.patch(trainer, "accumulate_grad_batches", self.batches_per_step(trainer.current_epoch))
        elif not isinstance(pl_module, ManualOptimizationMixin):
            raise MisconfigurationException(
                "GradientAccumulation under manual optimization needs a module that steps with"
                f" `ManualOptimizationMixin.optimize(loss, optimizer)`; {type(pl_module).__name__} has no such method,"
                " so every batch would step. Write `class YourModule(ManualOptimizationMixin, LightningModule)`."
            )

    def _resolve_when_loaded(self, target: TargetBatchSize, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute N when the training data are loaded, as `estimated_stepping_batches` does before it reads N."""
        setup_data = trainer.fit_loop.setup_data

        def setup_data_and_size() -> None:
            setup_data()
            if trainer.train_dataloader is not None:
                size, self._samples = micro_batches_for(target, trainer)
                self._sizes = {0: size}
                self._set_size(trainer, pl_module)

        self.session.patch(trainer.fit_loop, "setup_data", setup_data_and_size)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # A resume in mid-epoch never calls `on_train_epoch_start`.
        self._set_size(trainer, pl_module)
        self._warn_of_overrides(pl_module)
        self._restore(trainer, pl_module)
        if not pl_module.automatic_optimization:
            for optimizer in trainer.optimizers:  # for a step of torch's optimizer itself, without Lightning's hooks
                self.session.on_close(optimizer.register_step_pre_hook(self._refuse_step_by_hand).remove)

    def _warn_of_overrides(self, pl_module: LightningModule) -> None:
        """Warn of hooks that run less often than without accumulation, as GradientAccumulationScheduler does."""
        if not pl_module.automatic_optimization or max(self._sizes.values()) == 1:
            return
        for name in ("optimizer_step", "optimizer_zero_grad"):
            if is_overridden(name, pl_module) and is_overridden_by_user(pl_module, name):
                rank_zero_warn(
                    f"{type(self).__name__} accumulates, and {type(pl_module).__name__} overrides `{name}`, which"
                    " Lightning then calls once per step and not at every batch: if it counts batches, let it count"
                    " steps; otherwise nothing is wrong."
                )

    def _refuse_step_by_hand(self, optimizer: Optimizer, *_: Any) -> None:
        """Raise before a step that ``optimize`` does not take, since it would come whatever has been accumulated."""
        session, size = self.fit, max(self._sizes.values())
        if session is None or size == 1 or not session.counts_steps or session.windows is not self:
            return
        trainer, module = session.trainer, session.trainer.lightning_module
        if module.automatic_optimization:
            return
        index = trainer.optimizers.index(optimizer) if optimizer in trainer.optimizers else None
        if index is not None and index != self._closing:
            raise MisconfigurationException(
                f"{type(self).__name__} accumulates {size} micro-batches for a step, and {type(module).__name__} calls"
                f" `step` of optimizer {index} ({type(optimizer).__name__}) itself, whatever has been accumulated. Step"
                " with `self.optimize(loss, optimizer)` alone, which also does the backward pass and `zero_grad`:"
                " remove your calls of `manual_backward`, `step` and `zero_grad`."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._set_size(trainer, pl_module)
        self._largest = 0
        # Under manual optimization a module may add several micro-batches to a window in one batch.
        if pl_module.automatic_optimization and not math.isinf(trainer.num_training_batches):
            self._warn_if_short(trainer, int(trainer.num_training_batches))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Something else may have ended the epoch: a stop, or an `on_train_batch_start` that returned -1.
        if self._largest and is_last_batch(trainer) and not self._in_batch:
            self._warn_if_short(trainer, self._largest)
        self._check_weights(least=1)

    def _saw(self, count: int) -> None:
        """Note the number of micro-batches that a step of this epoch may have, those without a loss included."""
        self._largest = None if self._largest is None else max(self._largest, count)

    def _warn_if_short(self, trainer: Trainer, largest: int) -> None:
        """Warn once if no step of this epoch can have as many micro-batches as it should."""
        size = self.batches_per_step(trainer.current_epoch)
        if largest < size and not self._warned and not trainer.fast_dev_run:
            self._warned = True
            rank_zero_warn(
                f"{type(self).__name__} accumulates {size} micro-batches for a step, and in epoch"
                f" {trainer.current_epoch} no step has more than {largest}, since the epoch ends before: its steps are"
                f" those of smaller batches. Choose a size of at most {largest}, or make the epoch longer."
            )

    def _check_weights(self, least: int) -> None:
        """Warn if every weight of the run so far is 0. Waits for the device, once in a fit.

        Args:
            least: Number of windows from which on it is looked at.
        """
        if self._closed is None or self._any_weighed is None or self._closed < least:
            return
        if not bool(self._any_weighed):
            rank_zero_warn(
                f"{argument_of(self.weight_by)} has returned 0 for every micro-batch of the first {self._closed} steps,"
                " so that no loss has moved any weight. Does `weight_by` count the right elements, such as those whose"
                " label is not the index that your loss ignores?"
            )
        self._closed = self._any_weighed = None

    def _set_size(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization:
            trainer.accumulate_grad_batches = self.batches_per_step(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if pl_module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches == 0:
            self._windows.clear()  # Lightning zeroes the gradients here, also if the window before never closed
        self._in_batch = True
        if pl_module.automatic_optimization:
            self._saw(batch_idx + 1)
        if self.weight_by != "batch":
            self._weight = weight_of(batch, self.weight_by, pl_module.device)
            if self._unit is None or not self.is_open:
                self._unit = unit_of(self._weight, trainer.world_size, before=self._unit)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = False

    def weigh(self, window: Window) -> Tensor | None:
        """Add the present micro-batch to a window; return the factor for its loss, ``None`` if all weigh the same."""
        window.count += 1
        if self._weight is None or self._unit is None:
            return None
        return window.weigh(self._weight, self._unit)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if pl_module.automatic_optimization:
            share = self.weigh(self.window(trainer, 0))
            if share is not None:
                # A hook on the loss, and no other loss: the user's logged loss stays as it is.
                loss.register_hook(lambda grad: grad * share.to(grad.dtype))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._refuse_step_by_hand(optimizer)  # also where the scaler would skip the step, or the optimizer is a new one
        step = self.current_step(optimizer)
        window = self._windows.pop(step.index, None)
        if window is None or window.count == 0:
            return
        self._saw(window.count)
        factor = window.correction(trainer.world_size)
        if window.unit is not None:
            # The mean weight is the unit of a next window that begins with a weight of 0.
            self._unit = window.unit * (window.size / window.count) / factor
            self._note_weights(window, step)
        if isinstance(factor, Tensor) or factor != 1.0:
            for grad in shards.local_shards(step.dense[1]):
                grad.mul_(factor.to(grad.device) if isinstance(factor, Tensor) else factor)

    def _note_weights(self, window: Window, step: OptimizerStep) -> None:
        """Note whether the weights of a closed window are all 0, of a run that was seen from its start."""
        if self._closed is None or window.is_weighed is None:
            return
        self._closed += 1
        before = self._any_weighed
        self._any_weighed = window.is_weighed if before is None else before | window.is_weighed
        if step.logs:
            self._check_weights(least=_WINDOWS)

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        # A window that begins with a weight of 0 takes the unit of the window before it.
        unit = {} if self._unit is None else {"unit": float(self._unit)}
        open_windows = {index: window for index, window in self._windows.items() if window.count}
        if self.fit is None or not open_windows:
            return unit
        trainer = self.fit.trainer
        sharded: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        for name, parameter in _named(trainer, open_windows).items():
            # A sparse gradient is saved uncoalesced: the step sums its rows in the order in which they came.
            is_sparse = parameter.grad is not None and parameter.grad.is_sparse
            grad = parameter.grad if is_sparse else shards.align_grad_(parameter)
            if grad is not None:
                (sharded if isinstance(grad, DTensor) else own)[name] = grad
        return {
            "windows": {index: _plain(window) for index, window in open_windows.items()},
            "sharded": sharded,
            # Under DDP the gradients of ranks differ until the window closes.
            "by_rank": from_each_rank({name: grad.cpu() for name, grad in own.items()}, trainer.world_size),
            "totals": from_each_rank(_totals(open_windows), trainer.world_size),
            **unit,
        }

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._loaded = extra or None

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is None:
            return
        extra, self._loaded = self._loaded, None
        dtype = widest_dtype(pl_module.device)
        if "unit" in extra:
            self._closed = None  # a resumed run may end with windows of zeros
            self._unit = torch.tensor(extra["unit"], device=pl_module.device, dtype=dtype)
        if "windows" not in extra:
            return
        own, totals = (
            by_rank[trainer.global_rank] if len(by_rank) == trainer.world_size else _mean(by_rank)
            for by_rank in (extra["by_rank"], extra["totals"])
        )
        for index, saved in extra["windows"].items():
            window = self._windows[int(index)] = Window(saved["size"], saved["count"], saved["scale"])
            if saved["unit"] is not None:
                window.unit = torch.tensor(saved["unit"], device=pl_module.device, dtype=dtype)
                self._unit = window.unit if self._unit is None else self._unit
                window.total = totals[str(index)].to(pl_module.device, dtype)
        shards.reshard_(pl_module)
        live = _named(trainer, self._windows)
        for name, saved in {**extra["sharded"], **own}.items():
            parameter = live[module_tensors.plain_name(name)]
            if saved.is_sparse:
                parameter.grad = saved.to(parameter.device, copy=True)
            else:
                parameter.grad = torch.zeros_like(parameter)
                shards.copy_(parameter.grad, saved)


def _is_integer(number: Any, low: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= low


def _named(trainer: Trainer, windows: Iterable[int]) -> dict[str, Tensor]:
    """Return the parameters of these optimizers by name."""
    named: dict[str, Tensor] = {}
    for index in windows:
        step = OptimizerStep(trainer.optimizers[index], index=index, module=trainer.lightning_module)
        named |= zip(step.parameter_names, step.parameters, strict=True)
    return named


def _plain(window: Window) -> dict[str, Any]:
    """Return the values of a window that are equal on all ranks, for a checkpoint."""
    unit = None if window.unit is None else float(window.unit)
    return {"size": window.size, "count": window.count, "scale": window.scale, "unit": unit}


def _totals(windows: dict[int, Window]) -> dict[str, Tensor]:
    return {str(index): window.total.cpu() for index, window in windows.items() if window.total is not None}


def _mean(by_rank: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean over ranks, for a resume with another number of ranks: the step depends on nothing else."""
    names = {name: None for rank in by_rank for name in rank}
    held = {name: [rank[name] for rank in by_rank if name in rank] for name in names}
    return {name: functools.reduce(torch.add, some) / len(by_rank) for name, some in held.items()}
