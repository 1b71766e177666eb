"""Stop training when a metric stops improving, and restore the best weights."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.base.arguments import check_choice
from lightning_optim.base.metric_names import mode_of
from lightning_optim.base.suggestions import shown
from lightning_optim.plotting import check_metric, finish_panels, log_scale, mark_best, nothing_to_plot, panels
from lightning_optim.runtime import callback_state
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.evaluated_weights import RAW_METRICS
from lightning_optim.runtime.files.own_files import OwnFiles
from lightning_optim.runtime.lightning import EarlyStopping as LightningEarlyStopping
from lightning_optim.runtime.lightning import (
    EarlyStoppingBase,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_prefixed_message,
    rank_zero_warn,
)
from lightning_optim.runtime.lightning.packages import overrides, package_of
from lightning_optim.runtime.lightning.stopping import requested_stop
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.overridden_hooks import is_overridden_by_user
from lightning_optim.runtime.ran_elsewhere import check_no_copy_ran, check_not_lost, check_weights_are_here
from lightning_optim.runtime.refusals import hides_weights
from lightning_optim.stopping.best_weights import BestInDirectory, BestInMemory, BestWeights
from lightning_optim.stopping.criteria import DEFAULT_PATIENCE, Criterion, Plateau
from lightning_optim.stopping.directions import check_mode, directions, why_unlikely
from lightning_optim.stopping.early_stopping_attributes import EarlyStoppingAttributes, criterion_of
from lightning_optim.stopping.improvement import Mode
from lightning_optim.stopping.second_stopping import warn_of_second_stopping
from lightning_optim.stopping.stopping_reason import EarlyStoppingReason, as_lightnings, reason_to_stop
from lightning_optim.stopping.unreachable_patience import why_unreachable
from lightning_optim.stopping.unread_metric import why_missing, why_unread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NOT_CALLED = ("_evaluate_stopping_criteria", "_validate_condition_metric")  # methods of Lightning's class


class EarlyStopping(EarlyStoppingAttributes, OptimCallback, EarlyStoppingBase):
    r"""Stop training when a metric stops improving, and restore the best weights.

    ``EarlyStopping("val_loss", patience=5)`` stops after five validations in a row without an improvement. A value
    :math:`v` is an improvement if :math:`v + \delta < \mathrm{best}` (``mode="min"``) or :math:`v - \delta >
    \mathrm{best}` (``mode="max"``), where "best" is the best value so far and :math:`\delta` is ``min_delta``. A value
    that is not finite stops training at once.
    Pass a :class:`Criterion` as ``monitor`` for any other rule. Slow rules, with a large ``patience``, find better
    weights and cost more time (Prechelt, *Early stopping, but when?*, 1998).

    The arguments up to ``log_rank_zero_only`` are those of Lightning's ``EarlyStopping``, and its checkpoints resume
    here. These things differ:

    * With ``restore_best`` the module ends a normal fit with the best *evaluated* weights: those that the best
      validation used, which are the averaged ones if validation uses an average.
    * On resume, the ``patience`` passed to the constructor is used, not the one in the checkpoint.
    * A stop that was requested before ``min_epochs`` or ``min_steps`` is withdrawn if the metric improves meanwhile.
    * A second fit with the same callback starts from the beginning, with the weights that the module holds: the best
      ones, with new optimizers.
    * ``min_delta`` is positive, as it was passed; Lightning's attribute has a sign.
    * An attribute may be changed at any time, before a fit or in it, and a wrong value raises.

    A subclass that overrides ``on_validation_end`` or ``on_train_epoch_end`` needs no ``super()``: the metric is read
    all the same, before, and a call of ``self._run_early_stopping_check(trainer)`` in the same hook reads it no second
    time. To choose the moment, override ``_should_skip_check`` to return True, and make that call in another hook.

    Without ``dirpath`` the best weights are a copy on the CPU, and part of the callback's state: each checkpoint grows
    by one model. Frozen weights that the module leaves out of its checkpoints are left out here too. With ``dirpath``
    the best is a whole checkpoint in that directory, from which training can resume, and the state holds its path.

    After the fit, the raw weights are kept on the CPU. A checkpoint that is written then has the best weights as
    ``state_dict``, and a run that resumes from it continues from the raw weights. After an exception the module holds
    its raw weights; ``callback.restore_best_(module)`` restores the best ones. If the module has changed since the best
    validation, all weights that fit are restored, and a warning names the others. Pruning that was made permanent is
    applied to the best weights too.

    Args:
        monitor: Name of the logged metric, or a criterion.
        min_delta: Amount that an improvement must exceed, at least 0, in the unit of the metric. Default 0.
        patience: Number of validations without improvement after which training stops. Default 3, as in Lightning;
            choose more for a noisy metric. ``math.inf`` never stops, and keeps the best weights only.
        verbose: Log improvements, and the reason to stop.
        mode: ``"min"`` if smaller values are better (the default, for a loss), ``"max"`` if larger ones are.
        strict: Raise if the metric was not logged. Default ``True``.
        check_finite: Stop when the metric is NaN or infinite. Default ``True``.
        stopping_threshold: Stop as soon as the metric is better than this value. Default ``None``, off.
        divergence_threshold: Stop as soon as the metric is worse than this value. Default ``None``, off.
        check_on_train_epoch_end: Read the metric at the end of each training epoch; if false, after each validation.
            Default: at the end of the epoch if each epoch has one validation.
        log_rank_zero_only: With ``verbose``, log on rank 0 only.
        restore_best: Keep the best weights, and restore them at the end of the fit. Default ``True``.
        dirpath: Directory for the best weights, as the checkpoint ``best.ckpt``, or ``<name>.ckpt``. Default: keep them
            in memory.
        best_by: Metrics by which weights are the best: the name of one, a weighted sum ``{metric: weight}``, or a list
            in which a later metric decides only ties. The direction of each metric is that of the criterion that reads
            it; ``mode`` is that of the others, and of a weighted sum. Default: each improvement of the criterion.
        name: Distinguishes two callbacks with the same metric in a checkpoint.
        summary: See :class:`OptimCallback`.

    Attributes:
        criterion: The criterion in use; for the name of a metric an :class:`AnyOf` whose last is the :class:`Plateau`.
        history: Values of the monitored metrics and of those of ``best_by``, a dictionary for each validation.
        best_check: Index in ``history`` of the best validation; -1 before the first.
        stopped_epoch: Epoch in which the stop was decided; 0 if it was not.
        stopping_reason: Lightning's ``EarlyStoppingReason``.
        stopping_reason_message: Reason to stop, in a sentence; ``None`` without a stop.

    Raises:
        ValueError: If an argument is not in its range, if an argument of the plateau is passed beside a criterion, or
            if ``mode`` or the sign of a weight contradicts the criterion of a metric.
        MisconfigurationException: In a fit, if averaged weights would be restored by a metric of the raw ones
            (``averaging/raw/…``), or if a subclass overrides a private method of Lightning's class that this one does
            not call.
        RuntimeError: If ``strict`` and the metric was not logged.

    Example::

        >>> from lightning_optim import EarlyStopping, Plateau
        >>> EarlyStopping("val_loss", patience=5)
        EarlyStopping('val_loss', patience=5)
        >>> EarlyStopping(Plateau("accuracy", mode="max"), best_by=["accuracy", "val_loss"]).criterion
        Plateau('accuracy', mode='max')

    With a Trainer::

        trainer = Trainer(callbacks=[EarlyStopping("val_loss", patience=5)])
    """

    slot = Slot.STOP
    final_rank = 1
    _package: str | None = None  # of the Trainer that ran last

    def __init__(
        self,
        monitor: str | Criterion,
        min_delta: float = 0.0,
        patience: int | float = DEFAULT_PATIENCE,
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
        summary: bool = True,
    ) -> None:
        OptimCallback.__init__(self, name, summary)
        if dirpath is not None and not isinstance(dirpath, str | os.PathLike):
            raise ValueError(f"`dirpath={dirpath!r}` must be the path of a directory, or None for a copy in memory")
        self._monitor, self._mode = monitor, mode
        plateau = {"patience": patience, "min_delta": min_delta}
        bounds = {"stopping_threshold": stopping_threshold, "divergence_threshold": divergence_threshold}
        self.criterion = criterion_of(monitor, mode, check_finite, plateau, bounds)
        self.verbose, self.strict, self.log_rank_zero_only = verbose, strict, log_rank_zero_only
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.dirpath, self._before_fit = dirpath, {}
        self.best_by = best_by
        if best_by is None:
            check_choice("mode", mode, Mode)  # beside `best_by` it may be a list, which that has checked
            if isinstance(monitor, Criterion):
                check_mode(mode, monitor)
        self.restore_best = restore_best
        self.reset()

    @property
    def check_on_train_epoch_end(self) -> bool | None:
        """True to read the metric at the end of each training epoch; ``None``: if each epoch has one validation."""
        return self._check_on_train_epoch_end

    @check_on_train_epoch_end.setter
    def check_on_train_epoch_end(self, value: bool | None) -> None:
        self._check_on_train_epoch_end = value

    @property
    def stopping_reason(self) -> Any:
        """Reason to stop: a member of the ``EarlyStoppingReason`` of the package whose Trainer ran last."""
        return as_lightnings(self._reason, self._package)

    @property
    def touches(self) -> frozenset[str]:  # type: ignore[override]
        """``"weights"`` if the module's own are copied at the best validation and written at the end."""
        return frozenset({"weights"} if self.restore_best and self.dirpath is None else ())

    @property
    def identity(self) -> dict[str, Any]:
        if isinstance(self._monitor, Criterion):
            return {"monitor": self._monitor.identity}
        return {"monitor": self.monitor, "mode": self.mode}  # as in Lightning, so that its checkpoints resume here

    @property
    def final_opt_out(self) -> str:
        return f"pass `restore_best=False` to {type(self).__name__}" if self.restore_best else ""

    @property
    def stays(self) -> frozenset[str]:
        return frozenset({"_best_weights"} if self.dirpath is None else ())

    def describe_run(self) -> str:
        best = "not kept" if not self.restore_best else f"kept in {'memory' if self.dirpath is None else self.dirpath}"
        by = "" if self._best_by is None else f" by {self._best_by.in_words}"
        if isinstance(self._monitor, Criterion):
            return f"stop on {self.criterion.in_words}, best{by} {best}"
        metric = f"{self.monitor}{' (max)' if self.mode == 'max' else ''}"
        if self.patience == math.inf:
            return f"no stop by patience, best{by or f' by {metric}'} {best}"
        return f"stop on {metric}, patience {self.patience}, best{by} {best}"

    def report(self) -> str:
        if self.best_check < 0:
            return ""
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.history[self.best_check].items())
        validation = f"validation {self.best_check + 1:,} of {len(self.history):,}"
        which = " (averaged weights)" if self._best_is_averaged else ""
        is_restored = self.session.wrote_final is self
        last = f", restored{which}" if is_restored else ""
        if self.session.failed and self._best_weights.has_best:
            last = ", which `restore_best_(model)` writes into it"
        if self._best_by is None:
            return f"best {values} at {validation}{last}"
        # The values alone do not show why these are the best: another validation may be better in one of them.
        first = f"restored {validation}{which}" if is_restored else f"best at {validation}{last}"
        return f"{first}, best by {self._best_by.in_words}: {values}"

    def reset(self) -> None:
        self.criterion.reset()
        if self._best_by is not None:
            self._best_by.reset()
        self.stopped_epoch = 0
        self._reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._requested_stop = False
        self._stop_is_external = False  # requested by something else than an early stopping callback
        self._training = False
        self._checked_in = ""  # hook in which the metric was read last, by this class
        self._checks = 0  # number of checks in this fit
        self._validated = False  # a validation has ended in this fit
        self._missing: list[str] = []  # metrics that a check did not find
        self.history: list[dict[str, float]] = []
        self.best_check = -1
        self._best_is_averaged = False  # the best weights are those of an average
        self._own_files = OwnFiles() if self.fit is None else self.fit.own_files
        self._best_weights = self._new_best_weights(self.dirpath)
        self._left_out: set[str] = set()
        written, self._before_fit = self._before_fit, {}
        for attribute, value in written.items():
            setattr(self, attribute, value)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        OptimCallback.setup(self, trainer, pl_module, stage)
        self._package = package_of(trainer)
        if stage == "fit":
            self._refuse_metrics_of_other_weights()
        overridden = [name for name in _NOT_CALLED if overrides(type(self), name, LightningEarlyStopping)]
        if overridden:
            raise MisconfigurationException(
                f"{type(self).__name__} overrides {overridden} of Lightning's EarlyStopping, which this EarlyStopping"
                " does not call: pass a subclass of `Criterion` as `monitor`, whose `update` decides when to stop."
            )

    def _refuse_metrics_of_other_weights(self) -> None:
        """Raise if the averaged weights would be kept as the best by a metric of the raw ones."""
        deciding = self.criterion.monitors if self._best_by is None else self._best_by.monitors
        raw = [name for name in deciding if name.startswith(RAW_METRICS)]
        if raw and self.restore_best:
            evaluated = raw[0].removeprefix(RAW_METRICS)
            raise MisconfigurationException(
                f"EarlyStopping would restore averaged weights, which are those that a validation uses, by {raw[0]!r},"
                f" a metric of the raw ones: monitor {evaluated!r}, which is that of the averaged weights; or pass"
                f" `best_by={evaluated!r}`, or `restore_best=False`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        OptimCallback.on_train_start(self, trainer, pl_module)
        # Later than an average, which may have replaced the best weights in a checkpoint that was written after a fit.
        self._best_weights.resume_(pl_module)
        self._training = True
        self._requested_stop = self._requested_stop and trainer.should_stop  # a resumed run decides anew
        if not trainer.fast_dev_run:  # here and not in `setup`, which the Tuner calls for its trials too
            self._warn_of_arguments(trainer)

    def _warn_of_arguments(self, trainer: Trainer) -> None:
        warn_of_second_stopping(self.criterion.monitors, trainer)
        if unlikely := why_unlikely(self._monitor, self.criterion, self._best_by):
            rank_zero_warn(unlikely)
        self._warn_if_unreachable(trainer)

    def _warn_if_unreachable(self, trainer: Trainer) -> None:
        # A subclass may read the metric at other times.
        chosen = any(is_overridden_by_user(self, name) for name in ("_should_skip_check", "_run_early_stopping_check"))
        patience = self.patience if isinstance(self._monitor, str) else None
        if not chosen:
            why = why_unreachable(self.criterion, patience, trainer, self._checks_at_epoch_end(trainer))
            if why:
                rank_zero_warn(why)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._best_weights.add_unfrozen()

    # ---- reading the metric ------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_in("on_train_epoch_end", trainer, self._checks_at_epoch_end(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = self._validated or not trainer.sanity_checking
        self._check_in("on_validation_end", trainer, not self._checks_at_epoch_end(trainer))

    def _check_in(self, hook: str, trainer: Trainer, chosen: bool) -> None:
        self._checked_in = ""
        if chosen and not self._should_skip_check(trainer):
            self._checked_in = hook
            self._run_early_stopping_check(trainer)
            self._checks += is_overridden_by_user(self, "_run_early_stopping_check")

    def _checks_at_epoch_end(self, trainer: Trainer) -> bool:
        if self.check_on_train_epoch_end is not None:
            return self.check_on_train_epoch_end
        return trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1

    def _should_skip_check(self, trainer: Trainer) -> bool:
        """Return True outside of training. Subclasses of Lightning's class override this method."""
        return trainer.state.fn != "fit" or trainer.sanity_checking

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        """Read the metrics, decide whether to stop, and store the best weights.

        Subclasses of Lightning's class override this method, or call it in a hook of theirs.
        """
        if self._checked_in in self._package_results:  # a subclass calls it in the same hook, as it must in Lightning
            return
        metrics = trainer.callback_metrics
        if trainer.fast_dev_run or not self._available(trainer):
            return
        self._checks += 1
        stop = self.criterion.update(metrics)
        better = self.criterion.improved if self._best_by is None else self._best_by.better(metrics)
        # Ranks may have logged different values, and shards of different validations would not be one model.
        rank_0 = (self.criterion.improved, better, sorted(self._left_out))
        improved, better, left_out = trainer.strategy.broadcast(rank_0)
        stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        self._decide(trainer, stop, improved)
        self.history.append({name: float(metrics[name]) for name in self._names_read})
        if better:
            average = self.session.average
            self._best_is_averaged = average is not None and bool(average.averaged_state())
            self.best_check = len(self.history) - 1
            if self.restore_best:
                self._store_best(trainer, left_out)

    @property
    def _names_read(self) -> list[str]:
        return list(dict.fromkeys([*self.criterion.monitors, *(self._best_by.monitors if self._best_by else ())]))

    def _available(self, trainer: Trainer) -> bool:
        metrics = trainer.callback_metrics
        missing = [name for name in self._names_read if name not in metrics]
        self._missing = missing
        if not missing:
            return True
        message = (
            f"Early stopping reads {shown(missing)}, which {why_missing(missing, trainer, self._validated)}, or pass"
            f" `strict=False` to go on without it. Logged metrics: {shown(sorted(metrics))}."
        )
        if self.strict:
            raise RuntimeError(message)
        if self.verbose:
            rank_zero_warn(message, category=RuntimeWarning)
        return False

    def _decide(self, trainer: Trainer, stop: bool, improved: bool) -> None:
        stoppers = [callback for callback in trainer.callbacks if isinstance(callback, LightningEarlyStopping)]
        others = [callback for callback in stoppers if callback is not self]
        requested = self._requested_stop and trainer.should_stop
        if stop:
            self.stopped_epoch = trainer.current_epoch
            self._reason, self.stopping_reason_message = reason_to_stop(self.criterion, trainer.world_size)
            external = trainer.should_stop and not requested and not any(map(_requested_stop, others))
            self._stop_is_external = self._stop_is_external or external
            trainer.should_stop = True
        elif requested and improved:
            # The stop was requested before `min_epochs` or `min_steps`, and the metric has improved since.
            self.stopped_epoch, self._reason = 0, EarlyStoppingReason.NOT_STOPPED
            self.stopping_reason_message = None
            external = any(getattr(callback, "_stop_is_external", False) for callback in [self, *others])
            trainer.should_stop = external or any(map(_requested_stop, others))
            requested = False
        self._requested_stop = requested or stop
        if self.verbose and (message := self.criterion.reason or self._improvement()):
            self._log_info(trainer, message, self.log_rank_zero_only)

    def _improvement(self) -> str:
        if not self.criterion.improved:
            return ""
        return self.criterion.improvement or f"Metric {', '.join(self.criterion.monitors)} improved."

    @staticmethod
    def _log_info(trainer: Trainer, message: str, log_rank_zero_only: bool) -> None:
        rank = trainer.global_rank if trainer.world_size > 1 else None
        if rank in (None, 0) or not log_rank_zero_only:
            # Lightning's logger is used, since users have configured it.
            logger = logging.getLogger(f"{package_of(trainer)}.callbacks.early_stopping")
            logger.info(rank_prefixed_message(message, rank))

    def resume_ended(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._best_weights.resume_(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        OptimCallback.on_train_end(self, trainer, pl_module)
        told = bool(self._missing) and self.verbose  # at each check
        # A resumed run may end between two validations: those before it are in the history.
        if not self._checks and not self.history and not trainer.fast_dev_run and not told:
            rank_zero_warn(
                f"EarlyStopping read no value of {list(self.criterion.monitors)} in the whole fit, and so neither"
                f" stopped it nor kept weights of it as the best: {why_unread(self._missing, trainer, self._validated)}"
            )

    # ---- the best weights --------------------------------------------------------------------------------------------

    @property
    def best_path(self) -> str:
        """Path of the best checkpoint; empty without ``dirpath`` and before the first."""
        return self._best_weights.path

    def restore_best_(self, module: nn.Module) -> None:
        """Write the best weights and buffers into ``module``, for instance after an exception.

        If it is the module that was trained, its raw weights are kept, and a checkpoint that is written now resumes
        from them. Weights that do not fit, because the module has changed since, are named in a warning.

        Args:
            module: The trained module, or another one of the same architecture.

        Raises:
            RuntimeError: If no best weights were stored, or if the fit ran in other processes (``ddp_spawn``), in whose
                memory they stayed.
        """
        if not self.best_path:
            check_weights_are_here(
                self,
                "the best weights",
                "With `restore_best=True` the module that was trained ends with them; pass `dirpath=…` to keep them in"
                " a checkpoint.",
            )
        if not self._best_weights.has_best:
            check_no_copy_ran(self)
            raise RuntimeError(
                "There are no best weights: no validation has improved yet, or EarlyStopping has `restore_best=False`."
            )
        if self._best_weights.is_of(module) and (self.fit is None or self.fit.failed):
            self._best_weights.restore_(module)
        else:
            self._best_weights.copy_into_(module)

    def write_final_(self, pl_module: LightningModule) -> bool:
        if not self.restore_best or not self._best_weights.has_best:
            return False
        if hides_weights(self.session.trainer.strategy):
            rank_zero_warn(
                f"The best weights cannot be put into the module under this strategy: load them from {self.best_path}."
            )
            return False
        try:
            self._best_weights.restore_(pl_module)
        except Exception as error:
            if not self.best_path:
                raise
            # The training is done, and must not be lost because a checkpoint cannot be read.
            warnings.warn(
                f"The module keeps its last weights, because {self.best_path} with the best ones cannot be read:"
                f" {type(error).__name__}: {error}",
                stacklevel=1,
            )
            return False
        return True

    def _new_best_weights(self, directory: str | os.PathLike[str] | None) -> BestWeights:
        if directory is None:
            return BestInMemory()
        return BestInDirectory(os.fspath(directory), self.name or "best", self._own_files)

    def _store_best(self, trainer: Trainer, left_out: list[str]) -> None:
        new = self._new_best_weights(self.dirpath)
        if self._best_weights.location != new.location:  # those that were loaded come from a run with another `dirpath`
            self._best_weights = new
        elif isinstance(self._best_weights, BestInDirectory) and isinstance(new, BestInDirectory):
            self._best_weights.directory = new.directory  # as the user writes it
        self._best_weights.store(trainer, left_out)

    def plot(self, metric_or_optimizer: str | None = None, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot the monitored metrics over the validations, with a star at the best validation.

        Args:
            metric_or_optimizer: Name of one metric. Default: all that the criterion reads, each in small axes of its
                own.
            ax: Axes to draw on, which then hold all metrics; a new figure by default.

        Returns:
            The figure and its axes; of several the first (``figure.axes`` are all).

        Raises:
            ValueError: If the criterion does not read this metric.
            RuntimeError: If no validation has been read yet.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        check_not_lost(self)
        names: Sequence[str] = self.criterion.monitors
        if metric_or_optimizer is not None:
            names = [check_metric(metric_or_optimizer, names)]
        if not self.history:
            check_no_copy_ran(self)
            raise nothing_to_plot(f"no validation with {' and '.join(map(repr, names))} has ended. Train first.")
        figure, axes = panels(len(names), ax)
        for name, one in zip(names, axes, strict=True):
            values = [found[name] for found in self.history]
            one.plot(range(1, len(values) + 1), values, marker=".", label=name)
            if self.best_check >= 0:
                best = self.best_check
                mark_best(one, best + 1, values[best], f"best validation, {best + 1}: {values[best]:.4g}")
            # On a linear axis the first values of a loss flatten all that follows.
            falls = (directions(self.criterion).get(name) or mode_of(name)) == "min"
            finite = [value for value in values if math.isfinite(value)]
            if ax is None and falls and finite and min(finite) > 0 and max(finite) > 10 * min(finite):
                log_scale(one)
        finish_panels(axes, names, x="validations", title=self._title())
        return figure, axes[0]

    def _title(self) -> str:
        """Return in a few words why training stopped; the sentence is ``stopping_reason_message``."""
        if self._reason is EarlyStoppingReason.NOT_STOPPED:
            return "Monitored metrics: training was not stopped early"
        why = {
            EarlyStoppingReason.STOPPING_THRESHOLD: "threshold reached",
            EarlyStoppingReason.DIVERGENCE_THRESHOLD: "divergence",
            EarlyStoppingReason.NON_FINITE_METRIC: "a metric is not finite",
        }
        patience = f"patience {self.patience}" if isinstance(self._monitor, str) else "no improvement"
        return f"Stopped in epoch {self.stopped_epoch}: {why.get(self._reason, patience)}"

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        ours = {
            "criterion": self.criterion.state_dict(),
            "best_by": self._best_by.state_dict() if self._best_by else {},
            "asked_to_stop": self._requested_stop,
            "history": [dict(values) for values in self.history],
            "best_check": self.best_check,
            "best_is_averaged": self._best_is_averaged,
        }
        # The state key is that of Lightning's class, which fails to load a state without these.
        lightnings = {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": self._reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }
        return {**lightnings, **ours, **self._best_weights.extra_state()}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        OptimCallback.on_save_checkpoint(self, trainer, pl_module, checkpoint)
        callback_state.leave_out(trainer.strategy, pl_module, self.state_key, ("best", "raw"), self._left_out.update)

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
        self._requested_stop = extra.get("asked_to_stop", False)
        self.history, self.best_check = list(extra.get("history", [])), extra.get("best_check", -1)
        self._best_is_averaged = extra.get("best_is_averaged", False)
        self.stopped_epoch = extra["stopped_epoch"]
        self._reason = EarlyStoppingReason(extra.get("stopping_reason", 0))
        self.stopping_reason_message = extra.get("stopping_reason_message")
        path = extra.get("best_path", "")
        self._best_weights = self._new_best_weights(os.path.dirname(path) if path else None)
        self._best_weights.load_extra_state(extra)
        if self._training:  # after its trials a learning-rate finder restores the module, then the callbacks
            self._best_weights.resume_(self.session.trainer.lightning_module)


def _requested_stop(callback: LightningEarlyStopping) -> bool:
    return callback._requested_stop if isinstance(callback, EarlyStopping) else requested_stop(callback)
