"""Early stopping that keeps and restores the best weights."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.plotting import canvas
from lightning_optim.runtime import checkpoint_state
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.files.own_files import OwnFiles
from lightning_optim.runtime.lightning import EarlyStopping as LightningEarlyStopping
from lightning_optim.runtime.lightning import EarlyStoppingReason, LightningModule, Trainer, rank_zero_warn
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.refusals import hides_weights
from lightning_optim.runtime.spawned_processes import check_not_lost, check_weights_are_here
from lightning_optim.stopping.best_weights import BestInDirectory, BestInMemory, BestWeights
from lightning_optim.stopping.combined_criteria import AnyOf
from lightning_optim.stopping.criteria import Criterion, Divergence, NonFinite, Plateau, Threshold
from lightning_optim.stopping.early_stopping_attributes import EarlyStoppingAttributes
from lightning_optim.stopping.improvement import Mode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REASONS = {
    NonFinite: EarlyStoppingReason.NON_FINITE_METRIC,
    Threshold: EarlyStoppingReason.STOPPING_THRESHOLD,
    Divergence: EarlyStoppingReason.DIVERGENCE_THRESHOLD,
    Plateau: EarlyStoppingReason.PATIENCE_EXHAUSTED,
}


class EarlyStopping(EarlyStoppingAttributes, OptimCallback, LightningEarlyStopping):
    r"""Stop training when a metric stops improving, and end with the best weights.

    The arguments up to ``log_rank_zero_only`` are those of Lightning's ``EarlyStopping``, with their meaning, and a
    checkpoint of Lightning's resumes here. ``EarlyStopping("val_loss", patience=5)`` means
    ``EarlyStopping(Plateau("val_loss", patience=5))``. Different from Lightning's:

    * With ``restore_best`` the module ends a normal fit with the best *evaluated* weights: those that the check which
      improved has seen, the average's if validation uses an average.
    * On resume the patience that is given now wins, and not that of the checkpoint.
    * A stop that was asked for before ``min_epochs`` is taken back when the metric improves meanwhile.
    * A second fit with the same callback starts afresh, from the weights that the module holds: the best ones, with
      new optimizers.
    * ``min_delta`` is a size, as it was given; Lightning's attribute has a sign. Writing to an attribute, before a fit
      or in it, counts from then on, and a wrong value raises.

    Without ``dirpath`` the best is a copy on the CPU and part of the state: each checkpoint grows by one model. Frozen
    weights that the module leaves out of its checkpoints are left out here too. With ``dirpath`` the best is a whole
    checkpoint in that directory, from which training can resume, and the state holds the path.

    When the fit has ended, the raw weights lie where the best lay, or on the CPU if it lay in a directory: a checkpoint
    that is written then has the best as ``state_dict``, and a run that resumes from it goes on from the raw weights.
    After an exception the module holds its raw weights, and the best is at hand: ``callback.restore_best_(module)``.
    If the module has changed since the best check (pruning that was made permanent is undone in the best, but a buffer
    may have grown), what fits is restored, and a warning names the rest.

    Args:
        monitor: The metric's name, or a criterion.
        min_delta: What an improvement must exceed. Default 0.
        patience: Checks without improvement after which to stop. Default 3, as in Lightning.
        verbose: Log the reasons.
        mode: ``"min"`` if less is better, ``"max"`` if more is.
        strict: Raise if the metric is missing at a check.
        check_finite: Stop when the metric is NaN or infinite.
        stopping_threshold: Stop once the metric is better than this.
        divergence_threshold: Stop once the metric is worse than this.
        check_on_train_epoch_end: Check there; if false, after each validation. By default there, if one validation is
            run an epoch.
        log_rank_zero_only: Log on rank 0 only.
        restore_best: Keep the best weights, and end with them.
        dirpath: Where the best is kept as a checkpoint, ``best.ckpt`` or ``<name>.ckpt``.
        best_by: What is best, if not what the criterion calls an improvement: a metric, a weighted sum ``{metric:
            weight}``, or a list in order of rank, each in the direction of ``mode``.
        name: Tells two callbacks on one metric apart in checkpoints.

    Attributes:
        criterion: The criterion in use; for a plain ``monitor`` an :class:`AnyOf`, whose last is the :class:`Plateau`.
        history: What was monitored, at each check.
        best_check: The index in ``history`` of the best check; -1 before the first.
        stopped_epoch: The epoch at which the stop was decided; 0 if it was not.
        stopping_reason_message: Why, in a sentence.

    Raises:
        ValueError: If an argument is out of range, or one of the plateau's is given beside a criterion.
        RuntimeError: If ``strict`` and the metric is missing.

    Example::

        >>> from lightning_optim import EarlyStopping, Plateau
        >>> EarlyStopping("val_loss", patience=5)
        EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}
        >>> EarlyStopping(Plateau("accuracy", mode="max"), best_by=["accuracy", "f1"], mode="max").criterion
        Plateau(monitor='accuracy', mode='max')
    """

    slot = Slot.STOP
    _check_on_train_epoch_end: bool | None
    final_rank = 1

    def __init__(
        self,
        monitor: str | Criterion,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: Mode = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
        *,
        restore_best: bool = True,
        dirpath: str | os.PathLike[str] | None = None,
        best_by: str | dict[str, float] | list[str] | None = None,
        name: str | None = None,
    ) -> None:
        OptimCallback.__init__(self, name)
        if dirpath is not None and not isinstance(dirpath, str | os.PathLike):
            raise ValueError(f"`dirpath={dirpath!r}` must be the path of a directory, or None for a copy in memory")
        self._monitor, self._mode = monitor, mode
        plateau = {"patience": patience, "min_delta": min_delta}
        bounds = {"stopping_threshold": stopping_threshold, "divergence_threshold": divergence_threshold}
        self.criterion = _criterion(monitor, mode, check_finite, plateau, bounds)
        self.verbose, self.strict, self.log_rank_zero_only = verbose, strict, log_rank_zero_only
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.dirpath, self._before_fit = dirpath, {}
        self.best_by = best_by
        self.restore_best = restore_best
        self.reset()

    @property
    def check_on_train_epoch_end(self) -> bool | None:
        """Whether to check at the end of each epoch; ``None`` leaves it to how often validation runs."""
        return self._check_there

    @check_on_train_epoch_end.setter
    def check_on_train_epoch_end(self, value: bool | None) -> None:
        self._check_there = value
        if value is not None:
            self._check_on_train_epoch_end = value  # what Lightning's hooks read

    @property
    def touches(self) -> frozenset[str]:  # type: ignore[override]
        """The weights, if the module's own are read and written at the best check and at the end."""
        return frozenset({"weights"} if self.restore_best and self.dirpath is None else ())

    @property
    def identity(self) -> dict[str, Any]:
        if isinstance(self.monitor, Criterion):
            return {"monitor": self.monitor.identity}
        return {"monitor": self.monitor, "mode": self.mode}  # Lightning's own, so that its checkpoints resume here

    @property
    def stays(self) -> frozenset[str]:
        return frozenset({"_best_weights"} if self.dirpath is None else ())

    def reset(self) -> None:
        self.criterion.reset()
        if self._best_by is not None:
            self._best_by.reset()
        self.stopped_epoch = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._asked_to_stop = self._ends_anyway = False  # the latter: at the word of somebody else
        self._training = False
        self.history: list[dict[str, float]] = []
        self.best_check = -1
        self._check_on_train_epoch_end = self.check_on_train_epoch_end
        self._own_files = OwnFiles() if self.fit is None else self.fit.own_files
        self._best_weights = self._new_best_weights()
        self._left_out: set[str] = set()
        written, self._before_fit = self._before_fit, {}
        for attribute, value in written.items():
            setattr(self, attribute, value)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        OptimCallback.setup(self, trainer, pl_module, stage)
        LightningEarlyStopping.setup(self, trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        OptimCallback.on_train_start(self, trainer, pl_module)
        # After an average, which may lie over the best in a checkpoint that was written after a fit.
        self._best_weights.resume_(pl_module)
        self._training = True
        self._asked_to_stop = self._asked_to_stop and trainer.should_stop  # a resumed run asks again

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._best_weights.add_unfrozen()

    # ---- the check ---------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        LightningEarlyStopping.on_train_epoch_end(self, trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        LightningEarlyStopping.on_validation_end(self, trainer, pl_module)

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        """Lightning's hooks call this, at the end of a validation or of an epoch."""
        metrics = trainer.callback_metrics
        if trainer.fast_dev_run or not self._available(metrics):
            return
        stop = self.criterion.update(metrics)
        better = self.criterion.improved if self._best_by is None else self._best_by.better(metrics)
        # Ranks may have logged different values; shards of different checks would make a model that never was.
        rank_0 = (self.criterion.improved, better, sorted(self._left_out))
        improved, better, left_out = trainer.strategy.broadcast(rank_0)
        stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        self._decide(trainer, stop, improved)
        self.history.append({name: float(metrics[name]) for name in self.criterion.monitors})
        if better:
            self.best_check = len(self.history) - 1
            if self.restore_best:
                self._keep(trainer, left_out)

    def _available(self, metrics: dict[str, Tensor]) -> bool:
        needed = [*self.criterion.monitors, *(self._best_by.monitors if self._best_by else ())]
        missing = [name for name in needed if name not in metrics]
        if not missing:
            return True
        message = f"Early stopping reads {missing}, which is not logged. There are: {sorted(metrics)}."
        if self.strict:
            raise RuntimeError(message)
        if self.verbose:
            rank_zero_warn(message, category=RuntimeWarning)
        return False

    def _decide(self, trainer: Trainer, stop: bool, improved: bool) -> None:
        others = [callback for callback in trainer.early_stopping_callbacks if callback is not self]
        asked = self._asked_to_stop and trainer.should_stop
        if stop:
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason, self.stopping_reason_message = self._reason()
            alone = not any(map(_asked_to_stop, others))
            self._ends_anyway = self._ends_anyway or (trainer.should_stop and not asked and alone)
            trainer.should_stop = True
        elif asked and improved:
            # Asked for before `min_epochs` or `min_steps`, which did not let it happen; the metric has improved since.
            self.stopped_epoch, self.stopping_reason = 0, EarlyStoppingReason.NOT_STOPPED
            self.stopping_reason_message = None
            ends = any(getattr(callback, "_ends_anyway", False) for callback in [self, *others])
            trainer.should_stop = ends or any(map(_asked_to_stop, others))
            asked = False
        self._asked_to_stop = asked or stop
        if self.verbose and (said := self.criterion.reason or self._improvement()):
            self._log_info(trainer, said, self.log_rank_zero_only)

    def _improvement(self) -> str:
        if not self.criterion.improved:
            return ""
        best = f" New best score: {self.best_score:.3f}." if self._find(Plateau) else ""
        return f"Metric {', '.join(self.criterion.monitors)} improved.{best}"

    def _reason(self) -> tuple[EarlyStoppingReason, str]:
        """Why to stop: this rank's reason, or that of the first rank that has one."""
        candidates = self.criterion.criteria if isinstance(self.criterion, AnyOf) else [self.criterion]
        said = next((type(one) for one in candidates if one.reason), Plateau)
        mine = (_REASONS.get(said, EarlyStoppingReason.PATIENCE_EXHAUSTED).value, self.criterion.reason)
        reasons = [mine]
        if self.session.trainer.world_size > 1 and torch.distributed.is_initialized():
            reasons = [mine] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(reasons, mine)
        if mine[1]:
            return EarlyStoppingReason(mine[0]), mine[1]
        kind, reason = next((one for one in reasons if one[1]), mine)
        return EarlyStoppingReason(kind), f"Another rank decided to stop. {reason}".strip()

    # ---- the best ----------------------------------------------------------------------------------------------------

    @property
    def best_path(self) -> str:
        """The checkpoint of the best; empty without ``dirpath`` or before the first."""
        return self._best_weights.path if isinstance(self._best_weights, BestInDirectory) else ""

    def restore_best_(self, module: nn.Module) -> None:
        """Put the best weights and buffers into ``module``, after an exception, say.

        If it is the module that was trained, its raw weights are kept, and a checkpoint that is written now resumes
        from them. What does not fit, because the module has changed since, is left as it is, and named in a warning.

        Raises:
            RuntimeError: If there is no best yet, or if the fit ran in other processes (``ddp_spawn``), in whose memory
                the best stayed.
        """
        if not self.best_path:
            check_weights_are_here(
                self,
                "the best weights",
                "With `restore_best=True` the module that was trained ends with them; pass `dirpath=…` to keep them in"
                " a checkpoint.",
            )
        if not self._best_weights.has_best:
            raise RuntimeError("There is no best yet: no check has improved, or `restore_best=False`.")
        if self._best_weights.is_of(module) and (self.fit is None or self.fit.failed):
            self._best_weights.restore_(module)
        else:
            self._best_weights.copy_into_(module)

    def write_final_(self, pl_module: LightningModule) -> bool:
        if not self.restore_best or not self._best_weights.has_best:
            return False
        if hides_weights(self.session.trainer.strategy):
            rank_zero_warn(
                f"The best weights are in {self.best_path}: under this strategy they cannot be put into the module."
            )
            return False
        try:
            self._best_weights.restore_(pl_module)
        except Exception as error:
            if not self.best_path:
                raise
            # The training is done: a checkpoint that cannot be read is no reason to lose it.
            warnings.warn(
                f"The module keeps its last weights, because {self.best_path} with the best ones cannot be read:"
                f" {type(error).__name__}: {error}",
                stacklevel=1,
            )
            return False
        return True

    def _new_best_weights(self) -> BestWeights:
        if self.dirpath is None:
            return BestInMemory()
        return BestInDirectory(os.fspath(self.dirpath), self.name or "best", self._own_files)

    def _keep(self, trainer: Trainer, left_out: list[str]) -> None:
        new = self._new_best_weights()
        if self._best_weights.location != new.location:  # what was loaded is from a run with another `dirpath`
            self._best_weights = new
        elif isinstance(self._best_weights, BestInDirectory) and isinstance(new, BestInDirectory):
            self._best_weights.directory = new.directory  # by the name that the user gives it
        self._best_weights.store(trainer, left_out)

    def plot(self, axes: Axes | None = None) -> tuple[Figure, Axes]:
        """What was monitored over the checks, and which check was the best.

        Args:
            axes: Axes to draw on; a new figure by default.

        Returns:
            The figure and its axes. It needs matplotlib.
        """
        check_not_lost(self)
        figure, axes = canvas(axes)
        for name in self.criterion.monitors:
            axes.plot(range(1, len(self.history) + 1), [values[name] for values in self.history], label=name)
        if self.best_check >= 0:
            axes.axvline(self.best_check + 1, linestyle="--", color="0.4", label="best")
        axes.set(xlabel="check", title=self.stopping_reason_message)
        axes.legend()
        return figure, axes

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        ours = {
            "criterion": self.criterion.state_dict(),
            "best_by": self._best_by.state_dict() if self._best_by else {},
            "asked_to_stop": self._asked_to_stop,
            "history": [dict(values) for values in self.history],
            "best_check": self.best_check,
        }
        # Lightning's keys too: our state key is its own, and its class fails on a state that lacks one.
        return {**LightningEarlyStopping.state_dict(self), **ours, **self._best_weights.extra_state()}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        OptimCallback.on_save_checkpoint(self, trainer, pl_module, checkpoint)
        checkpoint_state.leave_out(trainer.strategy, pl_module, self.state_key, ("best", "raw"), self._left_out.update)

    def rank_state(self) -> dict[str, Tensor]:
        return self._best_weights.rank_state()

    def displaced(self) -> dict[str, Tensor]:
        return self._best_weights.displaced

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        if "criterion" in extra:
            self.criterion.load_state_dict(extra["criterion"])
            if self._best_by is not None and extra["best_by"]:
                self._best_by.load_state_dict(extra["best_by"])
        elif (plateau := self._find(Plateau)) is not None:  # a checkpoint of Lightning's class
            plateau.best, plateau.wait = float(extra["best_score"]), extra["wait_count"]
        self._asked_to_stop = extra.get("asked_to_stop", False)
        self.history, self.best_check = list(extra.get("history", [])), extra.get("best_check", -1)
        self.stopped_epoch = extra["stopped_epoch"]
        self.stopping_reason = EarlyStoppingReason(extra.get("stopping_reason", 0))
        self.stopping_reason_message = extra.get("stopping_reason_message")
        path = extra.get("best_path", "")
        directory = os.path.dirname(path)
        self._best_weights = (
            BestInDirectory(directory, self.name or "best", self._own_files) if path else BestInMemory()
        )
        self._best_weights.load_extra_state(extra)
        if self._training:  # a learning-rate finder restores what was before its trials, the module first
            self._best_weights.resume_(self.session.trainer.lightning_module)


def _asked_to_stop(callback: LightningEarlyStopping) -> bool:
    if isinstance(callback, EarlyStopping):
        return callback._asked_to_stop
    return callback.stopping_reason_message is not None


def _criterion(
    monitor: str | Criterion, mode: Mode, check_finite: bool, plateau: dict[str, Any], bounds: dict[str, float | None]
) -> Criterion:
    if isinstance(monitor, Criterion):
        defaults = {"patience": 3, "min_delta": 0.0, "stopping_threshold": None, "divergence_threshold": None}
        for argument, value in {**plateau, **bounds}.items():
            if value != defaults[argument]:
                raise ValueError(f"`{argument}={value!r}` belongs to a plain `monitor`: give it to {monitor!r}")
        return monitor
    criteria: list[Criterion] = [NonFinite(monitor)] if check_finite else []
    for kind, value in zip((Threshold, Divergence), bounds.values(), strict=True):
        criteria += [] if value is None else [kind(monitor, value, mode)]
    return AnyOf([*criteria, Plateau(monitor, mode=mode, **plateau)])
