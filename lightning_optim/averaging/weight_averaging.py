"""Weight averaging, as a callback: one average, the same in validation, files, test and predict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.averaging.average import Average
from lightning_optim.averaging.batchnorm.batches import check_arguments
from lightning_optim.averaging.batchnorm.refresh import in_training
from lightning_optim.averaging.training import lightning_checkpoints, pruning
from lightning_optim.averaging.training.averaged_weights import AveragedWeights
from lightning_optim.averaging.training.buffer_plan import (
    BufferMode,
    BufferModes,
    BufferPlan,
    check_buffer_modes,
    plan_buffers,
)
from lightning_optim.averaging.training.comparison import Comparison
from lightning_optim.averaging.training.evaluation import AveragedEvaluation
from lightning_optim.base.arguments import check_number
from lightning_optim.base.layer_classes import BatchNormBase
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.runtime import checkpoint_state
from lightning_optim.runtime.lightning import LightningModule, MisconfigurationException, ModelParallelStrategy, Trainer
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.overridden_hooks import is_overridden
from lightning_optim.runtime.spawned_processes import check_not_lost


class WeightAveraging(AveragedEvaluation):
    r"""Keep an average of the weights over the steps, and evaluate with it; the raw weights go on training.

    Each parameter is averaged when *its* optimizer really stepped; what was never trainable is not copied, and what was
    averaged once is averaged on, also while it is frozen. Integer and bool buffers are the latest.

    With ``evaluate=True`` there is one truth, as soon as the average has started: the averaged weights are what
    validation sees, so what is monitored, what every checkpoint holds as ``state_dict`` (weights-only files too), what
    is restored as the best, and what ``test``, ``predict`` and ``load_from_checkpoint`` use. The raw weights are in
    this callback's state, and training resumes from them. An average that never started is never used.

    The average is in the module during a validation and during ``trainer.save_checkpoint``: what a callback saves or
    exports by itself in ``on_save_checkpoint`` has the score that was monitored. In other hooks of training the module
    holds raw weights, and ``with callback.averaged_weights(module)`` puts the average in.

    A checkpoint of Lightning's ``WeightAveraging`` resumes here, and one of this callback there. Of several averages in
    one run each keeps its own weights; read one out with ``with callback.averaged_weights(module)``, or from a file
    with :func:`~lightning_optim.averaged_state_dict`.

    Args:
        average: What kind: ``EMA(0.999)``, ``SWA()``, ``LAWA(6)``.
        start: The optimizer steps that are left out before the first update; a float in [0, 1] is a fraction of the
            run. SWA is usually started at 0.75.
        every: Optimizer steps between two updates, >= 1; the first is after step ``start + 1``. An EMA's horizon in
            steps does not depend on it. ``"epoch"``: at the last batch of each epoch, before the validation there.
        device: Where the average is kept; ``"cpu"`` saves memory of the accelerator, and costs a copy at each update.
            Default: beside the weights, where a swap needs no more than a few MB.
        dtype: In what the average is kept, whatever the weights are. Default fp32: in bf16 an average with a decay of
            0.999 never moves. ``None``: fp32 for what is narrower, else the weights' own.
        buffers: What becomes of floating-point buffers, such as running statistics: ``"average"`` averages them like
            weights; ``"copy"`` uses the latest; ``"refresh"`` averages them, and estimates the statistics of BatchNorm
            anew before every use of an average that changed. ``None`` is ``"average"`` for an EMA, whose weights are
            close to one another, and ``"refresh"`` for SWA and LAWA, which break down without it. A dictionary from
            patterns of names to these: the first that matches decides, and ``"*"`` is the rest. Of that, known kinds
            that are no means are found: scales of fake quantization, observers and masks of pruning are copied, and the
            vectors of spectral normalization are estimated by power iteration.
        refresh_batches: How many batches a refresh takes, at most one pass over the data. ``None``: all.
        refresh_loader: Where they come from. Default: the training data, over an iterator of its own.
        evaluate: Whether validation and files use the average. Of several averages at most one may.
        apply_at_end: Whether the module ends with the average when the fit ends normally. Of several averages the
            evaluated one goes before, and ``EarlyStopping(restore_best=True)`` before all.
        compare: Validate the raw weights too, before each validation of the average: :meth:`plot` shows both, and
            ``averaging/raw/…`` is logged with the metrics of the average. It costs a second validation, in which the
            module's hooks run but callbacks do not.
        name: Tells two averages of one kind apart in checkpoints.

    Attributes:
        comparison: What ``compare`` has collected.

    Raises:
        ValueError: If an argument is none of these.
        MisconfigurationException: For a pattern of ``buffers`` that matches nothing, for two evaluated averages, for
            two others that the module would both end with, beside Lightning's own averaging, for a fraction in a run
            without a known end, or for statistics to refresh that ``training_step`` cannot estimate; the message says
            what to do.

    Example::

        >>> from lightning_optim import EMA, SWA, WeightAveraging
        >>> WeightAveraging(EMA(0.999))
        WeightAveraging{'average': 'EMA()'}
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
    ) -> None:
        super().__init__(name)
        if not isinstance(average, Average):
            raise ValueError(f"`average={average!r}` must be an average, such as EMA(0.999)")
        if isinstance(start, float):
            check_number("start", start, low=0.0, high=1.0)
        else:
            check_number("start", start, low=0, integer=True)
        if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f'`every` must be an integer >= 1 or "epoch", got {every!r}')
        check_buffer_modes(buffers)
        check_arguments(refresh_batches, refresh_loader)
        if compare and not evaluate:
            raise ValueError("`compare=True` compares with the average that is evaluated, got `evaluate=False`")
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
    def stays(self) -> frozenset[str]:
        return frozenset({"refresh_loader", "_held", "_loaded"})

    @property
    def needs_total(self) -> bool:
        return isinstance(self.start, float) or self.average.scheduled

    def reset(self) -> None:
        self.comparison = Comparison()
        self._averaged: AveragedWeights | None = None
        self._held: dict[str, Tensor] = {}
        self._loaded: dict[str, Any] | None = None
        self._layers: list[BatchNormBase] = []
        self._unfrozen = None
        self._start_step = 0 if isinstance(self.start, float) else self.start
        self._asked = [0, -1]  # the last step and the last epoch at which `should_update` said yes

    # ---- life --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.evaluates:
            pruning.refuse_within_validation(trainer.callbacks, type(self).__name__)
        if stage != "fit" or self.device is None or not isinstance(trainer.strategy, ModelParallelStrategy):
            return
        if self.device.type != trainer.strategy.root_device.type:
            raise MisconfigurationException(
                f"{type(self).__name__}(device={str(self.device)!r}): the average of a sharded model lies with its"
                " shards. Pass `device=None`."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._buffer_plan(pl_module)  # before a sanity check
        if self.evaluates:
            self._install(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if isinstance(self.start, float):
            self._start_step = int(self.start * self.session.total)
        self._begin(trainer, pl_module)
        self.try_before_first_step(trainer, pl_module, self._layers)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average.keep_in(self.dtype, self.device)
        plan = self._buffer_plan(pl_module)
        self._averaged, self._layers = (
            AveragedWeights(pl_module, trainer.optimizers, self.average, plan),
            plan.layers,
        )
        self._take_over(self._averaged)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        assert self._averaged is not None
        self._averaged.follow(self.current_step(optimizer).index)

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        index = self.current_step(optimizer).index
        if not self._asks and self._due(self.steps[index]):
            self._update(index)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._asks:
            if trainer.global_step > self._asked[0] and self.should_update(step_idx=trainer.global_step - 1):
                self._asked[0] = trainer.global_step
                self._update_all()
            return
        loop = trainer.fit_loop.epoch_loop
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        if loop.batch_progress.is_last_batch or loop._is_training_done or stops:
            self._end_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not self._asks:
            # An epoch that `on_train_batch_start` or a later callback's stop cut short had no last batch's end.
            self._end_epoch()
        elif trainer.current_epoch > self._asked[1] and self.should_update(epoch_idx=trainer.current_epoch):
            self._asked[1] = trainer.current_epoch
            self._update_all()
        self._follow_pruning()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._follow_pruning()
        if self.apply_at_end or self.evaluates:
            self._settle(trainer, pl_module)

    def _follow_pruning(self) -> None:
        # Pruning ends in `on_train_end`. At the epoch's end or there, before or after us, its last masks are seen.
        if self._averaged is not None:
            self._averaged.follow_pruning()

    def resume_ended(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None:
            self._begin(trainer, pl_module)
            if self.apply_at_end or self.evaluates:
                self._settle(trainer, pl_module)

    def write_final_(self, pl_module: LightningModule) -> bool:
        if not self.apply_at_end or not self.started:
            return False
        assert self._averaged is not None
        self._averaged.leave_in()
        return True

    def _buffer_plan(self, pl_module: LightningModule) -> BufferPlan:
        plan = plan_buffers(pl_module, self.buffers, self._rest, type(self).__name__)
        if sharded := [type(norm.owner).__name__ for norm in plan.vectors if norm.sharded]:
            raise MisconfigurationException(
                f"{type(self).__name__} estimates the vectors of spectral normalization anew for averaged weights, and"
                f" no rank holds the whole weight of these: {sharded}. Train with DDP, or pass"
                ' `buffers={"*_u": "copy", "*_v": "copy"}`, which uses the latest.'
            )
        return plan

    # ---- when --------------------------------------------------------------------------------------------------------

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Decide whether to update after a step, or at the end of an epoch; override it to choose the moments.

        An override is called as by Lightning's ``WeightAveraging``: at the end of each batch that stepped, with
        ``step_idx``, and at the end of each training epoch, with ``epoch_idx``. Each update takes in the weights of all
        optimizers and counts as one step, so that an EMA decays once, whatever lies between two updates. By default
        ``start`` and ``every`` decide, step by step of each optimizer.

        Args:
            step_idx: The index of the last step, from 0, or ``None`` at the end of an epoch.
            epoch_idx: The index of the epoch that ends, from 0, or ``None`` after a step.

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
            return self._due(step_idx + 1)
        return epoch_idx is not None and self._due_epoch(max(self.steps, default=self._start_step + 1), epoch_idx)

    @property
    def _asks(self) -> bool:
        """Whether a user decides when to update."""
        return is_overridden(self, "should_update")

    def _due(self, step: int) -> bool:
        """Whether to update after this step of an optimizer."""
        since = step - self._start_step - 1
        return self.every != "epoch" and since >= 0 and since % self.every == 0

    def _due_epoch(self, step: int, epoch: int) -> bool:
        """Whether to update at the end of this epoch, with so many steps behind."""
        return self.every == "epoch" and step > self._start_step

    def _end_epoch(self) -> None:
        for index, step in enumerate(self.steps):
            if self._due_epoch(step, self.session.trainer.current_epoch):
                self._update(index)

    def _update(self, index: int, step: int | None = None) -> None:
        assert self._averaged is not None
        self._averaged.update_(index, self.steps[index] if step is None else step)
        self._unfrozen = in_training(self._layers)

    def _update_all(self) -> None:
        """Take in all weights; to the average it is one step after the last update."""
        assert self._averaged is not None
        for index, average in enumerate(self._averaged.averages):
            self._update(index, average.counters.get("last", self.steps[index] - 1) + 1)

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        if self._averaged is None:
            return self._loaded or {}
        comparison = {"comparison": self.comparison.points} if self.comparison.points else {}
        asked = {"asked": list(self._asked)} if self._asks else {}
        averages = pruning.permanent(self._averaged.state(self._saved_as_state_dict), self._masks())
        return {**averages, **comparison, **asked, **self._unfrozen_by_name()}

    def _unfrozen_by_name(self) -> dict[str, list[str]]:
        """Return the names of the BatchNorm layers that were not frozen at the last update."""
        module = None if self._averaged is None else self._averaged.module
        if self._unfrozen is None or module is None:
            return {}
        unfrozen = {id(layer) for layer in self._unfrozen}
        return {"unfrozen": [plain_name(name) for name, layer in module.named_modules() if id(layer) in unfrozen]}

    def _masks(self) -> dict[str, Tensor]:
        """Return the masks of weights that are pruned in the module, and whose pruning is permanent in checkpoints."""
        module = None if self._averaged is None else self._averaged.module
        if module is None or self.fit is None or not pruning.is_permanent_in_files(self.fit.trainer.callbacks):
            return {}
        return pruning.masks_by_name(module)

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._loaded = extra or None
        if self.fit is not None and self._averaged is not None:
            # In the middle of a fit: a learning-rate finder restores what was before its trials. The module has the
            # file's weights already, which are the averaged ones.
            self._take_over(self._averaged)

    def _take_over(self, shadow: AveragedWeights) -> None:
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self._asked = list(loaded.get("asked", [0, -1]))
            if "unfrozen" in loaded and (module := shadow.module) is not None:
                named = {plain_name(name): layer for name, layer in module.named_modules()}
                self._unfrozen = [
                    layer for layer in self._layers if any(layer is named.get(n) for n in loaded["unfrozen"])
                ]
            shadow.load(lightning_checkpoints.with_counters(loaded, self.steps))
            self.comparison.load(loaded.get("comparison", []))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._saved_as_state_dict and self._averaged is not None:
            lightning_checkpoints.add_for_lightning(checkpoint, self._averaged, self._masks())
            lightning_checkpoints.leave_out_as_state_dict(trainer.strategy)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._stage == "fit" and lightning_checkpoints.receiver_of_raw_weights(trainer, checkpoint) is self:
            self._loaded = lightning_checkpoints.state_from_other_average(checkpoint, self.average, self.state_key)

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds the average as loaded state: the model's own tensors do not travel with the callback."""
        held = {**super().__getstate__(), "_averaged": None, "_layers": [], "_unfrozen": None}
        if self._averaged is not None and self._averaged.started:
            held["_loaded"] = checkpoint_state.export(self.extra_state(), None)
            averaged = {name: tensor.detach() for name, tensor in self._averaged.named().items()}
            held["_held"] = checkpoint_state.export(averaged, None)
        return held

    # ---- pictures ----------------------------------------------------------------------------------------------------

    def plot(self, metric: str | None = None) -> tuple[Any, Any]:
        """The metric of the raw weights against that of the averaged ones, over the steps, where ``compare=True``.

        Args:
            metric: Its name, which may be left out if validation logs one only.

        Returns:
            The figure and its axes. It needs matplotlib.
        """
        check_not_lost(self)
        return self.comparison.plot(metric)


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
