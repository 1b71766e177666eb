"""Decide when to stop, by one metric that was logged: plateau, threshold, divergence, NaN."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.base.policy import Policy
from lightning_optim.stopping.improvement import Metrics, Mode, check_monitor, initial_best, read


class Criterion(Policy):
    """Base class of rules that read the metrics of each validation and say whether to stop.

    Numbers that a user tunes, such as ``patience``, are not in the state: a resumed run uses those passed to it.

    A new criterion is a subclass with :meth:`update`. It keeps the metric's name in ``self.monitor`` (or overrides
    :attr:`monitors`), declares with ``add_state`` what it remembers, and sets ``improved`` and ``reason`` each time::

        >>> class Worse(Criterion):
        ...     '''Stop as soon as a metric is worse than its best value.'''
        ...     def __init__(self, monitor):
        ...         self.monitor = monitor
        ...         self.add_state("best", math.inf)
        ...     def update(self, metrics):
        ...         value = self.read(metrics).item()
        ...         stop, self.improved = value > self.best, value < self.best
        ...         self.best = min(value, self.best)
        ...         self.reason = f"{self.monitor} got worse." if stop else ""
        ...         return stop
        >>> worse = Worse("loss")
        >>> worse.update({"loss": 2.0}), worse.update({"loss": 1.0}), worse.update({"loss": 1.5})
        (False, False, True)
        >>> worse.reason
        'loss got worse.'

    Attributes:
        monitor: Name of the metric.
        mode: ``"min"`` if less is better, ``"max"`` if more is.
        improved: True if the last validation was the best so far; its weights are worth keeping.
        improvement: What improved, in a sentence for the log; empty to name the metric only.
        reason: The reason to stop, in one sentence; empty as long as there is no reason.

    For a Trainer: ``Trainer(callbacks=[EarlyStopping(Worse("val_loss"))])``.
    """

    identity_args: ClassVar[tuple[str, ...]] = ("monitor", "mode")
    used_in = "EarlyStopping({})"
    formulas = (("update",),)
    monitor: str
    mode: Mode
    improved: bool = False
    improvement: str = ""
    reason: str = ""

    @property
    def monitors(self) -> tuple[str, ...]:
        """Names of the metrics that are read."""
        return (self.monitor,)

    def update(self, metrics: Metrics) -> bool:
        """Read the metrics of one validation, and decide whether to stop; to be overridden.

        Args:
            metrics: Name to number or tensor of one element.

        Returns:
            True to stop.

        Raises:
            KeyError: If a metric is missing; the message names those that exist.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `update(self, metrics)`")

    def read(self, metrics: Metrics) -> Tensor:
        """Return the metric ``self.monitor`` as a scalar tensor on the CPU, in its own dtype.

        Raises:
            KeyError: If it is missing; the message names those that exist.
        """
        return read(metrics, self.monitor)

    def better(self, value: Tensor, than: float) -> bool:
        """Return True if a value is strictly better; compared in its dtype, as Lightning does, and False for NaN.

        A subclass of :class:`Plateau`, :class:`Threshold` or :class:`Divergence` may override it.
        """
        return bool(value < than if self.mode == "min" else value > than)

    def reset(self) -> None:
        """Forget everything, as before the first validation."""
        super().reset()
        self.improved, self.improvement, self.reason = False, "", ""


DEFAULT_PATIENCE = 3  # Lightning's


def check_patience(patience: int | float) -> int | float:
    """Check that ``patience`` is an integer >= 0 or infinite, and return it."""
    if patience == math.inf and isinstance(patience, float):
        return patience
    try:
        return check_number("patience", patience, low=0, integer=True)
    except ValueError as error:
        raise ValueError(f"{error}; `math.inf` never stops, and keeps the best weights only") from None


class Plateau(Criterion):
    r"""Stop when a metric has not improved for ``patience`` validations.

    A value improves if it is better than the best one by more than ``min_delta``: :math:`v + \delta < best` in mode
    ``"min"``, :math:`v - \delta > best` in mode ``"max"``, computed in the metric's dtype. This is the rule of
    Lightning's ``EarlyStopping``: an improvement of exactly ``min_delta`` does not count, and the best value stays
    where it is meanwhile, so that a slow drift counts as soon as it adds up. NaN is never an improvement. Slow criteria
    generalize better and cost more time (Prechelt, *Early stopping, but when?*, 1998).

    Args:
        monitor: The metric's name.
        patience: Number of validations without improvement after which to stop, >= 0; 0 acts like 1, and ``math.inf``
            never stops. Default 3, as in Lightning.
        mode: ``"min"`` if less is better, ``"max"`` if more is. Default ``"min"``, for a loss.
        min_delta: Size that an improvement must exceed, >= 0, in the metric's unit. Default 0.

    Attributes:
        best: Best value so far; infinitely bad before the first.
        wait: Number of validations since.

    Raises:
        ValueError: If an argument is not one of its range.

    Example::

        >>> plateau = Plateau("val_loss", patience=2)
        >>> [plateau.update({"val_loss": loss}) for loss in (0.9, 0.7, 0.8, 0.7)]
        [False, False, False, True]
        >>> plateau.reason
        "Monitored metric 'val_loss' did not improve in the last 2 checks. Best score: 0.700."

    For a Trainer: ``Trainer(callbacks=[EarlyStopping(Plateau("val_loss", patience=5))])``.
    """

    best: float
    wait: int

    def __init__(
        self, monitor: str, patience: int | float = DEFAULT_PATIENCE, mode: Mode = "min", min_delta: float = 0.0
    ) -> None:
        self.monitor = check_monitor(monitor, "Plateau", "patience", patience)
        self.patience = check_patience(patience)
        self.min_delta = check_number("min_delta", min_delta, low=0.0)
        self.mode = check_choice("mode", mode, Mode)
        self.add_state("best", initial_best(mode))
        self.add_state("wait", 0)

    def update(self, metrics: Metrics) -> bool:
        value = self.read(metrics)
        delta = self.min_delta if self.mode == "min" else -self.min_delta
        self.improved = self.better(value + delta, self.best)
        gain = abs(self.best - value.item())
        amount = f" by {gain:.3f} >= min_delta = {self.min_delta}" if math.isfinite(gain) else ""
        told = f"Metric {self.monitor} improved{amount}. New best score: {value.item():.3f}."
        self.improvement = told if self.improved else ""
        self.best, self.wait = (value.item(), 0) if self.improved else (self.best, self.wait + 1)
        stop = not self.improved and self.wait >= self.patience
        checks = "check" if self.wait == 1 else f"{self.wait} checks"
        told = f"{self.monitor!r} did not improve in the last {checks}. Best score: {self.best:.3f}."
        self.reason = f"Monitored metric {told}" if stop else ""
        return stop


class Threshold(Criterion):
    """Stop once a metric is good enough: strictly better than ``value``.

    Args:
        monitor: The metric's name.
        value: Bound that must be passed.
        mode: ``"min"`` if less is better, ``"max"`` if more is. Default ``"min"``.

    Attributes:
        best: Best value so far among those that were good enough.

    Raises:
        ValueError: If an argument is not one of its range.

    Example::

        >>> threshold = Threshold("accuracy", 0.9, mode="max")
        >>> [threshold.update({"accuracy": accuracy}) for accuracy in (0.8, 0.9, 0.95)]
        [False, False, True]

    For a Trainer: ``Trainer(callbacks=[EarlyStopping(Threshold("val_loss", 0.1))])``.
    """

    best: float

    def __init__(self, monitor: str, value: float, mode: Mode = "min") -> None:
        self.monitor = check_monitor(monitor, "Threshold", "value", value)
        self.value, self.mode = check_number("value", value), check_choice("mode", mode, Mode)
        self.add_state("best", initial_best(mode))

    def update(self, metrics: Metrics) -> bool:
        value = self.read(metrics)
        stop = self.better(value, self.value)
        # The first value beyond the threshold is better than all before; a run that must go on may see worse ones.
        self.improved = stop and self.better(value, self.best)
        self.best = value.item() if self.improved else self.best
        told = f"{self.monitor!r} = {value.item()} {'<' if self.mode == 'min' else '>'} {self.value}."
        self.reason = f"Stopping threshold reached: {told}" if stop else ""
        return stop


class Divergence(Criterion):
    """Stop once a metric is hopeless: strictly worse than ``value``.

    Args:
        monitor: The metric's name.
        value: Bound that must not be passed.
        mode: ``"min"`` if less is better, so that more than ``value`` is hopeless; ``"max"`` the other way round.
            Default ``"min"``.

    Raises:
        ValueError: If an argument is not one of its range.

    Example::

        >>> divergence = Divergence("loss", 10.0)
        >>> [divergence.update({"loss": loss}) for loss in (3.0, 10.0, 11.0)]
        [False, False, True]

    For a Trainer: ``Trainer(callbacks=[EarlyStopping(Divergence("val_loss", 10.0))])``.
    """

    def __init__(self, monitor: str, value: float, mode: Mode = "min") -> None:
        self.monitor = check_monitor(monitor, "Divergence", "value", value)
        self.value, self.mode = check_number("value", value), check_choice("mode", mode, Mode)

    def update(self, metrics: Metrics) -> bool:
        value = self.read(metrics)
        stop = self.better(-value, -self.value)
        told = f"{self.monitor!r} = {value.item()} {'>' if self.mode == 'min' else '<'} {self.value}."
        self.reason = f"Divergence threshold reached: {told}" if stop else ""
        return stop


class NonFinite(Criterion):
    """Stop when a metric is NaN or infinite.

    Args:
        monitor: The metric's name.

    Example::

        >>> criterion = NonFinite("loss")
        >>> criterion.update({"loss": float("nan")}), criterion.reason
        (True, "Monitored metric 'loss' = nan is not finite.")

    For a Trainer: ``Trainer(callbacks=[EarlyStopping(NonFinite("val_loss"))])``.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = check_monitor(monitor, "NonFinite")

    def update(self, metrics: Metrics) -> bool:
        value = self.read(metrics).item()
        stop = not math.isfinite(value)
        self.reason = f"Monitored metric {self.monitor!r} = {value} is not finite." if stop else ""
        return stop
