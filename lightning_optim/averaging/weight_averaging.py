"""Average the weights of a run: decide when to update the average; save, load and apply it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.averaging.averages.average import Average
from lightning_optim.averaging.batchnorm.refresh import in_training
from lightning_optim.averaging.batchnorm.refresh_batches import check_arguments
from lightning_optim.averaging.training import lightning_checkpoints, pruned_parameters
from lightning_optim.averaging.training.averaged_weights import AveragedWeights
from lightning_optim.averaging.training.averaged_weights_state import load_state_, state_of
from lightning_optim.averaging.training.buffer_plan import (
    BufferMode,
    BufferModes,
    BufferPlan,
    check_buffer_modes,
    plan_buffers,
)
from lightning_optim.averaging.training.checkpoint_state_dict import AveragedCheckpoints
from lightning_optim.averaging.training.raw_against_averaged import Comparison
from lightning_optim.base.arguments import check_number
from lightning_optim.base.layer_classes import BatchNormBase
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.base.policy import belongs_to
from lightning_optim.runtime import callback_state
from lightning_optim.runtime.lightning import (
    LightningModule,
    MisconfigurationException,
    ModelParallelStrategy,
    Trainer,
    rank_zero_warn,
)
from lightning_optim.runtime.lightning.loops import ends_epoch
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.overridden_hooks import is_overridden_by_user
from lightning_optim.runtime.ran_elsewhere import check_no_copy_ran, check_not_lost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class WeightAveraging(AveragedCheckpoints):
    r"""Average the weights over the optimizer steps, and validate, save and end with the average.

    Training goes on with the raw weights. A parameter is averaged after each step of *its* optimizer that really
    happened; frozen parameters that never were trainable are not copied. Integer and bool buffers are the latest ones.

    With ``evaluate=True`` the averaged weights are, from the first update on, those of the validation and so of the
    monitored metric; the ``state_dict`` of every checkpoint, weights-only ones included; the weights that are restored
    as the best; and those of ``test``, ``predict`` and ``load_from_checkpoint``. The raw weights are in this callback's
    state in the checkpoint, and training resumes from them. An average without an update is never used.

    The module holds the average during a validation and during ``trainer.save_checkpoint``, so that weights that
    another callback exports there have the score that was monitored. In the other hooks of training it holds the raw
    weights; use :meth:`averaged_weights` to export the average from there.

    Checkpoints of Lightning's ``WeightAveraging`` resume here, and those of this callback resume there. If a run has
    several of these callbacks, each keeps its own average: read one out of the module with :meth:`averaged_weights`,
    or out of a checkpoint with :func:`~lightning_optim.averaged_state_dict`.

    Args:
        average: The policy: ``EMA(0.999)``, ``SWA()`` or ``LAWA(6)``.
        start: Number of optimizer steps before the first update, or, as a float in [0, 1], their share of the run.
            Default 0. SWA usually starts at 0.75.
        every: Number of optimizer steps from one update to the next, >= 1; the first update is after step
            ``start + 1``. ``"epoch"`` updates at the last batch of each epoch, before the validation there. The
            horizon of an EMA, in steps, does not depend on it.
        device: Device of the averaged tensors. Default ``None``: that of the weights, where an exchange for a
            validation takes a few MB. ``"cpu"`` saves memory of the accelerator, and copies at every update.
        dtype: Floating dtype of the averaged tensors, whatever that of the weights is. Default fp32, since an average
            with decay 0.999 never moves in bf16. ``None``: fp32 for half precision, else that of the weight.
        buffers: Mode of the floating-point buffers, such as running statistics. ``"average"`` averages them like
            weights; ``"copy"`` uses the latest; ``"refresh"`` averages them, and estimates the statistics of BatchNorm
            anew before every use of an average that has changed. Default ``None``: ``"average"`` for an EMA, whose
            weights are close to one another, and ``"refresh"`` for SWA and LAWA, whose accuracy breaks down without.
            A dictionary from name patterns to modes uses the first pattern that matches; ``"*"`` is for all other
            buffers, except for kinds that are known to have no mean: scales of fake quantization, observers and masks
            of pruning are copied, and vectors of spectral normalization are estimated by power iteration.
        refresh_batches: Number of batches of one refresh, at most those of one epoch. Default 100; ``None``: all.
        refresh_loader: Loader of these batches. Default: the training data, through a separate iterator.
        evaluate: If True, validations and checkpoints use this average. At most one callback of a run may.
        apply_at_end: If True, the module holds the average after a fit that ended normally. Of several averages the
            evaluated one is taken, and the weights of ``EarlyStopping(restore_best=True)`` go before any average.
        compare: If True, the raw weights are validated too, before each validation of the average: :meth:`plot` shows
            both, and ``averaging/raw/<metric>`` is logged beside the metrics of the average. The second validation
            calls the hooks of the module and none of callbacks.
        name: Name that tells two averages of one kind apart in checkpoints.
        summary: See :class:`OptimCallback`.

    Attributes:
        comparison: Metrics that ``compare=True`` has collected.

    Raises:
        ValueError: If an argument is not allowed.
        MisconfigurationException: In ``setup`` or before the first step: for a pattern of ``buffers`` that matches
            nothing, two evaluated averages, two averages of which neither is evaluated and both would be applied at
            the end, Lightning's own averaging beside an evaluated one, a fraction as ``start`` in a run without a known
            end, or BatchNorm statistics that ``training_step`` cannot estimate. The message names the way out.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_optim import EMA, SWA, WeightAveraging
        >>> trainer = Trainer(callbacks=[WeightAveraging(EMA(0.999))], logger=False)
        >>> WeightAveraging(SWA(), start=0.75, every="epoch").buffers
        'refresh'
    """

    slot = Slot.AVERAGE
    touches = frozenset({"weights"})

    def __init__(
        self,
        average: Average,
        start: int | float = 0,
        every: int | Literal["epoch"] = 1,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | str | None = torch.float32,
        buffers: BufferModes | None = None,
        refresh_batches: int | None = 100,
        refresh_loader: Iterable[Any] | None = None,
        evaluate: bool = True,
        apply_at_end: bool = True,
        compare: bool = False,
        name: str | None = None,
        summary: bool = True,
    ) -> None:
        super().__init__(name, summary)
        if not isinstance(average, Average):
            raise ValueError(
                f"`average` must be an average, such as EMA(0.999), got {average!r}{belongs_to(average, Average)}"
            )
        average.check_complete()
        if isinstance(start, float):
            check_number("start", start, low=0.0, high=1.0)
        else:
            check_number("start", start, low=0, integer=True)
        if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f'`every` must be an integer >= 1 or "epoch", got {every!r}')
        check_buffer_modes(buffers)
        check_arguments(refresh_batches, refresh_loader)
        if compare and not evaluate:
            raise ValueError("`compare=True` compares the raw weights with the evaluated average, got `evaluate=False`")
        self.average, self.start, self.every = average, start, every
        self.device = _device(device)
        self.dtype = _dtype(dtype)
        self._rest: BufferMode = "average" if average.smooths_statistics else "refresh"
        self.buffers = self._rest if buffers is None else buffers
        self.refresh_batches, self.refresh_loader = refresh_batches, refresh_loader
        self.evaluates, self.apply_at_end, self.compare = evaluate, apply_at_end, compare
        self.final_rank = 2 if evaluate else 3  # type: ignore[misc]
        self.reset()

    @property
    def identity(self) -> dict[str, Any]:
        return {"average": self.average.identity}

    @property
    def final_opt_out(self) -> str:
        return f"pass `apply_at_end=False` to {type(self).__name__}" if self.apply_at_end else ""

    @property
    def stays(self) -> frozenset[str]:
        return frozenset({"refresh_loader", "_copied", "_loaded"})

    @property
    def needs_total(self) -> bool:
        return isinstance(self.start, float) or self.average.scheduled

    def reset(self) -> None:
        self.comparison = Comparison()
        self._averaged: AveragedWeights | None = None
        self._copied: dict[str, Tensor] = {}
        self._loaded: dict[str, Any] | None = None
        self._warned_never_updated = False
        self._layers: list[BatchNormBase] = []
        self._unfrozen = None
        self._start_step = 0 if isinstance(self.start, float) else self.start
        self._decided = [0, -1]  # the last step and the last epoch at which an overridden `should_update` returned True

    def describe_step(self, index: int) -> tuple[str, str]:
        when = "when `should_update` returns True" if self._user_decides else self._describe_when()
        words = f"average {self.average.in_words} {when}".rstrip()
        return "", words if self.evaluates else f"{words} (not evaluated)"

    def _describe_when(self) -> str:
        """Return a few words on when it is updated; "" if it is after each step."""
        every = "" if self.every == 1 else "every epoch" if self.every == "epoch" else f"every {self.every} steps"
        start = self._first_step()
        return f"{every} from step {start + 1:,} on".lstrip() if start else every

    def report(self) -> str:
        if self._averaged is None or not self.started:
            return ""
        counts = [average.counters.get("updates", 0) for average in self._averaged.averages]
        updates = f"{' and '.join(f'{count:,}' for count in counts)} update{'' if counts == [1] else 's'}"
        average = f"the average {self.average.in_words} of {updates}"
        writer = self.session.wrote_final
        if writer is self:
            return f"the module holds {average}"
        if writer is not None:
            return ""
        where = f"{average} is in `averaged_weights(model)`"
        return where if self.session.failed else f"{where}, raw weights are in the module"

    # ---- life --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.evaluates:
            pruned_parameters.refuse_within_validation(trainer.callbacks, type(self).__name__)
        if stage != "fit" or self.device is None or not isinstance(trainer.strategy, ModelParallelStrategy):
            return
        if self.device.type != trainer.strategy.root_device.type:
            raise MisconfigurationException(
                f"{type(self).__name__}(device={str(self.device)!r}): the average of a sharded model must be on the"
                " device of its shards. Pass `device=None`."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._buffer_plan(pl_module)  # to refuse wrong patterns before the sanity check
        if self.evaluates:
            self._use_in_evaluation(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start_step = self._first_step()
        self._begin(trainer, pl_module)
        self.try_before_first_step(trainer, pl_module, self._layers)
        self._warn_before_first_step()

    def _first_step(self) -> int:
        """Return the number of optimizer steps before the first update."""
        return int(self.start * self.session.total) if isinstance(self.start, float) else self.start

    def _warn_before_first_step(self) -> None:
        """Warn if the average cannot do in this run what its arguments say."""
        trainer = self.session.trainer
        if self._user_decides or trainer.fast_dev_run or trainer.train_dataloader is None:
            return
        steps = self.session.total - self._start_step
        if math.isinf(steps):
            return
        if steps <= 0:
            self._warn_never_updated(
                f"it starts after {self._start_step:,} optimizer steps, and this run has {self.session.total:,}"
            )
        elif unreached := self.average.unreached(int(steps)):
            rank_zero_warn(unreached)

    def _warn_never_updated(self, reason: str) -> None:
        self._warned_never_updated = True
        rank_zero_warn(f"{self.brief} has no effect: {reason}. Start it earlier, or leave it out.")

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average.keep_in(self.dtype, self.device)
        plan = self._buffer_plan(pl_module)
        self._layers = plan.layers
        self._averaged = AveragedWeights(pl_module, trainer.optimizers, self.average, plan)
        self._load_into(self._averaged)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        assert self._averaged is not None
        index = self.current_step(optimizer).index
        self._averaged.follow(index, trainer.optimizers[index])

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        index = self.current_step(optimizer).index
        if not self._user_decides and self._due_after_step(self.steps[index]):
            self._update(index)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._user_decides:
            if trainer.global_step > self._decided[0] and self.should_update(step_idx=trainer.global_step - 1):
                self._decided[0] = trainer.global_step
                self._update_all()
            return
        if ends_epoch(trainer):
            self._end_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not self._user_decides:
            # `on_train_batch_end` misses an end by `on_train_batch_start`, or by a callback that came later.
            self._end_epoch()
        elif trainer.current_epoch > self._decided[1] and self.should_update(epoch_idx=trainer.current_epoch):
            self._decided[1] = trainer.current_epoch
            self._update_all()
        self._follow_pruning()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._follow_pruning()
        if not (self.started or self._warned_never_updated or trainer.fast_dev_run) and any(self.steps):
            self._warn_never_updated(f"it was not updated in the {max(self.steps):,} optimizer steps of this run")
        if self.apply_at_end or self.evaluates:
            self._make_ready(pl_module)

    def _follow_pruning(self) -> None:
        # A callback that prunes may come before or after this one: its last masks are seen at the end of training.
        if self._averaged is not None:
            self._averaged.follow_pruning()

    def resume_ended(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None:
            self._begin(trainer, pl_module)
            if self.apply_at_end or self.evaluates:
                self._make_ready(pl_module)

    def write_final_(self, pl_module: LightningModule) -> bool:
        if not self.apply_at_end or not self.started:
            return False
        assert self._averaged is not None
        self._averaged.leave_in_model_()
        return True

    def _buffer_plan(self, pl_module: LightningModule) -> BufferPlan:
        plan = plan_buffers(pl_module, self.buffers, self._rest, type(self).__name__)
        if sharded := [type(norm.owner).__name__ for norm in plan.vectors if norm.sharded]:
            raise MisconfigurationException(
                f"{type(self).__name__} estimates the vectors of spectral normalization anew for averaged weights, and"
                f" no rank holds the whole weight of {sharded}. Train with DDP, or pass"
                ' `buffers={"*_u": "copy", "*_v": "copy"}`, which uses the latest.'
            )
        return plan

    # ---- when to update ----------------------------------------------------------------------------------------------

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Decide whether to update the average now; override it to choose the moments yourself.

        An override is called as Lightning's ``WeightAveraging`` calls it: at the end of each batch with a step, with
        ``step_idx``, and at the end of each training epoch, with ``epoch_idx``. Each update then takes in the weights
        of all optimizers and counts as one step, so that an EMA decays once however many steps lie between two updates.
        By default ``start`` and ``every`` decide, separately for each optimizer.

        Args:
            step_idx: Index of the last step, from 0; ``None`` at the end of an epoch.
            epoch_idx: Index of the epoch that ends, from 0; ``None`` after a step.

        Example::

            >>> from lightning_optim import EMA, WeightAveraging
            >>> class Late(WeightAveraging):
            ...     def should_update(self, step_idx=None, epoch_idx=None):
            ...         return step_idx is not None and step_idx >= 100
            >>> Late(EMA(0.99)).should_update(step_idx=100)
            True
            >>> WeightAveraging(EMA(0.99), start=5).should_update(step_idx=4)
            False
        """
        if step_idx is not None:
            return self._due_after_step(step_idx + 1)
        return epoch_idx is not None and self._due_after_epoch(max(self.steps, default=self._start_step + 1), epoch_idx)

    @property
    def _user_decides(self) -> bool:
        """True if the user's override of :meth:`should_update` decides."""
        return is_overridden_by_user(self, "should_update")

    def _due_after_step(self, step: int) -> bool:
        """Return True if an update is due after this step of an optimizer, counted from 1."""
        since = step - self._start_step - 1
        return self.every != "epoch" and since >= 0 and since % self.every == 0

    def _due_after_epoch(self, step: int, epoch: int) -> bool:
        """Return True if an update is due at the end of this epoch, after so many steps."""
        return self.every == "epoch" and step > self._start_step

    def _end_epoch(self) -> None:
        for index, step in enumerate(self.steps):
            if self._due_after_epoch(step, self.session.trainer.current_epoch):
                self._update(index)

    def _update(self, index: int, step: int | None = None) -> None:
        assert self._averaged is not None
        self._averaged.update_(index, self.steps[index] if step is None else step)
        self._unfrozen = in_training(self._layers)

    def _update_all(self) -> None:
        """Update with the weights of all optimizers, as one step after the last update."""
        assert self._averaged is not None
        for index, average in enumerate(self._averaged.averages):
            self._update(index, average.counters.get("last", self.steps[index] - 1) + 1)

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        if self._averaged is None:
            return self._loaded or {}
        comparison = {"comparison": self.comparison.points} if self.comparison.points else {}
        asked = {"asked": list(self._decided)} if self._user_decides else {}
        averages = pruned_parameters.permanent(
            state_of(self._averaged, self._saved_as_state_dict), self._permanent_masks()
        )
        told = {
            "policy": self.average.brief
        }  # with its numbers, which the key leaves out; for `lightning-optim inspect`
        return {**averages, **told, **comparison, **asked, **self._unfrozen_by_name()}

    def _unfrozen_by_name(self) -> dict[str, list[str]]:
        """Return the names of the BatchNorm layers that were not frozen at the last update."""
        module = None if self._averaged is None else self._averaged.module
        if self._unfrozen is None or module is None:
            return {}
        unfrozen = {id(layer) for layer in self._unfrozen}
        return {"unfrozen": [plain_name(name) for name, layer in module.named_modules() if id(layer) in unfrozen]}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._loaded = extra or None
        if self.fit is not None and self._averaged is not None:
            # In the middle of a fit a learning-rate finder restores the checkpoint from before its trials. The module
            # has the weights of its `state_dict` already, which are the averaged ones.
            self._load_into(self._averaged)

    def _load_into(self, average: AveragedWeights) -> None:
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self._decided = list(loaded.get("asked", [0, -1]))
            if "unfrozen" in loaded and (module := average.module) is not None:
                named = {plain_name(name): layer for name, layer in module.named_modules()}
                self._unfrozen = [
                    layer for layer in self._layers if any(layer is named.get(n) for n in loaded["unfrozen"])
                ]
            load_state_(average, lightning_checkpoints.with_counters(loaded, self.steps))
            self.comparison.load(loaded.get("comparison", []))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._stage == "fit" and lightning_checkpoints.receiver_of_raw_weights(trainer, checkpoint) is self:
            self._loaded = lightning_checkpoints.state_from_other_average(checkpoint, self.average, self.state_key)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which holds copies of the averaged tensors and no tensor of the model."""
        copied = {**super().__getstate__(), "_averaged": None, "_layers": [], "_unfrozen": None}
        if self._averaged is not None and self._averaged.started:
            copied["_loaded"] = callback_state.export(self.extra_state(), None)
            averaged = {name: tensor.detach() for name, tensor in self._averaged.named().items()}
            copied["_copied"] = callback_state.export(averaged, None)
        return copied

    def plot(self, metric_or_optimizer: str | None = None, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot the metrics of the raw and of the averaged weights over the optimizer steps.

        A star marks the best value of each metric, where it is known whether this is the smallest or the largest: from
        a callback that monitors the metric, or from its name (``loss``, ``accuracy``).

        Args:
            metric_or_optimizer: Name of one metric. Default: all, each in small axes of its own.
            ax: Axes to draw on, which then hold all metrics. Default: those of a new figure.

        Returns:
            The figure and its axes; of several the first (``figure.axes`` are all).

        Raises:
            ValueError: If no validation logged this metric.
            RuntimeError: If no validation has compared, which takes ``compare=True``.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        check_not_lost(self)
        if not self.comparison.points:
            check_no_copy_ran(self)
        return self.comparison.plot(metric_or_optimizer, ax=ax)


def _device(device: str | int | torch.device | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'`device` must be one that torch knows, such as "cpu" or "cuda:0", got {device!r}') from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1):
        raise ValueError(f"`dtype` must be a floating dtype of 16 bits or more, such as torch.float32, got {dtype!r}")
    return found
