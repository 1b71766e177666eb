"""Early stopping that keeps and restores the best weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.early_stopping import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_optim.callback import OptimCallback
from lightning_optim.figures import canvas
from lightning_optim.refusals import hides_weights
from lightning_optim.slots import Slot
from lightning_optim.stopping.best import InDirectory, InMemory, Keeper
from lightning_optim.stopping.criteria import Criterion, Divergence, NonFinite, Plateau, Threshold
from lightning_optim.stopping.ranking import Best
from lightning_optim.stopping.several import AnyOf

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REASONS = {
    NonFinite: EarlyStoppingReason.NON_FINITE_METRIC,
    Threshold: EarlyStoppingReason.STOPPING_THRESHOLD,
    Divergence: EarlyStoppingReason.DIVERGENCE_THRESHOLD,
    Plateau: EarlyStoppingReason.PATIENCE_EXHAUSTED,
}


class EarlyStopping(OptimCallback, LightningEarlyStopping):
    r"""Stop training when a metric stops improving, and end with the best weights.

    The arguments up to ``log_rank_zero_only`` are those of Lightning's ``EarlyStopping``, with their meaning, and a
    checkpoint of Lightning's resumes here. ``EarlyStopping("val_loss", patience=5)`` means
    ``EarlyStopping(Plateau("val_loss", patience=5))``. Different from Lightning's:

    * With ``restore_best`` the module ends a normal fit with the best *evaluated* weights: those that the check which
      improved has seen, the average's if validation uses an average.
    * On resume the patience that is given now wins, and not that of the checkpoint.
    * A stop that was asked for before ``min_epochs`` is taken back when the metric improves meanwhile.
    * A second fit with the same callback starts afresh.

    Without ``dirpath`` the best is a copy on the CPU and part of the state: each checkpoint grows by one model. With
    it, the best is a whole checkpoint in that directory, from which training can resume, and the state holds the path.
    After an exception the module holds its raw weights, and the best is at hand: ``callback.restore_best_(module)``.

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
    final_rank = 1

    def __init__(
        self,
        monitor: str | Criterion,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
        *,
        restore_best: bool = True,
        dirpath: str | None = None,
        best_by: str | dict[str, float] | list[str] | None = None,
        name: str | None = None,
    ) -> None:
        OptimCallback.__init__(self, name)
        self.monitor, self.min_delta, self.patience, self.mode = monitor, min_delta, patience, mode
        self.check_finite, self.stopping_threshold = check_finite, stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.verbose, self.strict, self.log_rank_zero_only = verbose, strict, log_rank_zero_only
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.restore_best, self.dirpath, self.best_by = restore_best, dirpath, best_by
        self.criterion = self._criterion()
        self._best_by = None if best_by is None else Best(best_by, mode)
        if restore_best and best_by is None and len(set(self.criterion.monitors)) > 1:
            raise ValueError(
                f"`best_by=None` leaves open which of {self.criterion.monitors} says what is best: name a metric,"
                " weights {metric: weight} or a list in order of rank, or give `restore_best=False`"
            )
        self.touches = frozenset({"weights"}) if restore_best and dirpath is None else frozenset()  # type: ignore[misc]
        self.reset()

    def _criterion(self) -> Criterion:
        monitor: str | Criterion = self.monitor
        if isinstance(monitor, Criterion):
            defaults = {"min_delta": 0.0, "patience": 3, "stopping_threshold": None, "divergence_threshold": None}
            given = [argument for argument, default in defaults.items() if getattr(self, argument) != default]
            if given:
                raise ValueError(
                    f"`{given[0]}={getattr(self, given[0])!r}` belongs to a plain `monitor`: give it to {monitor!r}"
                )
            return monitor
        criteria: list[Criterion] = [NonFinite(monitor)] if self.check_finite else []
        if self.stopping_threshold is not None:
            criteria.append(Threshold(monitor, self.stopping_threshold, self.mode))
        if self.divergence_threshold is not None:
            criteria.append(Divergence(monitor, self.divergence_threshold, self.mode))
        return AnyOf([*criteria, Plateau(monitor, self.patience, self.mode, self.min_delta)])

    @property
    def _plateau(self) -> Plateau | None:
        last = self.criterion.criteria[-1] if isinstance(self.criterion, AnyOf) else self.criterion
        return last if isinstance(last, Plateau) else None

    @property
    def identity(self) -> dict[str, Any]:
        if isinstance(self.monitor, Criterion):
            return {"monitor": self.monitor.identity}
        return {"monitor": self.monitor, "mode": self.mode}  # Lightning's own, so that its checkpoints resume here

    def reset(self) -> None:
        self.criterion.reset()
        if self._best_by is not None:
            self._best_by.reset()
        self.stopped_epoch = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._asked_to_stop = False
        self.history: list[dict[str, float]] = []
        self.best_check = -1
        self._check_on_train_epoch_end = self.check_on_train_epoch_end
        self._keeper: Keeper = InMemory() if self.dirpath is None else InDirectory(self.dirpath, self.name or "best")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        OptimCallback.setup(self, trainer, pl_module, stage)
        LightningEarlyStopping.setup(self, trainer, pl_module, stage)

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
        improved = self.criterion.improved if self._best_by is None else self._best_by.better(metrics)
        # Ranks may have logged different values; shards of different checks would make a model that never was.
        improved = trainer.strategy.broadcast(improved)
        stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        self._decide(trainer, stop)
        self.history.append({name: float(metrics[name]) for name in self.criterion.monitors})
        if improved:
            self.best_check = len(self.history) - 1
            if self.restore_best:
                self._keeper.keep(trainer)

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

    def _decide(self, trainer: Trainer, stop: bool) -> None:
        if stop:
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason = self._reason()
            self.stopping_reason_message = self.criterion.reason or "Another rank decided to stop."
        elif self._asked_to_stop and self.criterion.improved:
            # Asked for before `min_epochs` or `min_steps`, which did not let it happen; the metric has improved since.
            self.stopped_epoch, self.stopping_reason, self.stopping_reason_message = (
                0,
                EarlyStoppingReason.NOT_STOPPED,
                None,
            )
            trainer.should_stop = False
        self._asked_to_stop = stop or (self._asked_to_stop and trainer.should_stop)
        trainer.should_stop = trainer.should_stop or stop
        if self.verbose and self.criterion.reason:
            self._log_info(trainer, self.criterion.reason, self.log_rank_zero_only)

    def _reason(self) -> EarlyStoppingReason:
        candidates = self.criterion.criteria if isinstance(self.criterion, AnyOf) else [self.criterion]
        said = next((type(one) for one in candidates if one.reason), Plateau)
        return _REASONS.get(said, EarlyStoppingReason.PATIENCE_EXHAUSTED)

    # ---- the best ----------------------------------------------------------------------------------------------------

    @property
    def best_path(self) -> str:
        """The checkpoint of the best; empty without ``dirpath`` or before the first."""
        return self._keeper.path if isinstance(self._keeper, InDirectory) else ""

    def restore_best_(self, module: nn.Module) -> None:
        """Copy the best weights and buffers into ``module``, after an exception, say.

        Raises:
            RuntimeError: If there is no best yet.
        """
        if not self._keeper.has_best:
            raise RuntimeError("There is no best yet: no check has improved, or `restore_best=False`.")
        self._keeper.restore_(module)

    def write_final_(self, pl_module: LightningModule) -> bool:
        if not self.restore_best or not self._keeper.has_best:
            return False
        if hides_weights(self._running.trainer.strategy):
            rank_zero_warn(
                f"The best weights are in {self.best_path}: under this strategy they cannot be put into the module."
            )
            return False
        self._keeper.restore_(pl_module)
        return True

    def plot(self, axes: Axes | None = None) -> tuple[Figure, Axes]:
        """What was monitored over the checks, and which check was the best.

        Args:
            axes: Axes to draw on; a new figure by default.

        Returns:
            The figure and its axes. It needs matplotlib.
        """
        figure, axes = canvas(axes)
        for name in self.criterion.monitors:
            axes.plot(range(1, len(self.history) + 1), [values[name] for values in self.history], label=name)
        if self.best_check >= 0:
            axes.axvline(self.best_check + 1, linestyle="--", color="0.4", label="best")
        axes.set(xlabel="check", title=self.stopping_reason_message)
        axes.legend()
        return figure, axes

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def wait_count(self) -> int:
        """Checks since the last improvement."""
        return self._plateau.wait if self._plateau else 0

    @property
    def best_score(self) -> Tensor:
        """The best value of the plateau's metric."""
        return torch.tensor(self._plateau.best if self._plateau else float("nan"))

    def extra_state(self) -> dict[str, Any]:
        ours = {
            "criterion": self.criterion.state_dict(),
            "best_by": self._best_by.state_dict() if self._best_by else {},
            "asked_to_stop": self._asked_to_stop,
            "history": [dict(values) for values in self.history],
            "best_check": self.best_check,
        }
        module = self.fit.trainer.lightning_module if self.fit is not None else None
        # Lightning's keys too: our state key is its own, and its class fails on a state that lacks one.
        return {**LightningEarlyStopping.state_dict(self), **ours, **self._keeper.extra_state(module)}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        if "criterion" in extra:
            self.criterion.load_state_dict(extra["criterion"])
            if self._best_by is not None and extra["best_by"]:
                self._best_by.load_state_dict(extra["best_by"])
        elif self._plateau is not None:  # a checkpoint of Lightning's class
            self._plateau.best, self._plateau.wait = float(extra["best_score"]), extra["wait_count"]
        self._asked_to_stop = extra.get("asked_to_stop", False)
        self.history, self.best_check = list(extra.get("history", [])), extra.get("best_check", -1)
        self.stopped_epoch = extra["stopped_epoch"]
        self.stopping_reason = EarlyStoppingReason(extra.get("stopping_reason", 0))
        self.stopping_reason_message = extra.get("stopping_reason_message")
        self._keeper.load_extra_state(extra)
