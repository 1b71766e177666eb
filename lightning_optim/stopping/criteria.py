"""Criteria of when to stop, on numbers that were logged, and of which weights to keep."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.policy import Policy
from lightning_optim.schedules import check_number

Metrics = Mapping[str, "float | Tensor"]


class Criterion(Policy, abc.ABC):
    """A rule that reads the metrics at each check and says whether to stop.

    The numbers that a user tunes, such as ``patience``, are not in the state: on resume the arguments given now win.

    A new criterion is a subclass with :meth:`update` and :attr:`monitors`, and with ``reset``, ``state_dict`` and
    ``load_state_dict`` if it remembers something::

        >>> class Negative(Criterion):
        ...     monitors = ("loss",)
        ...     def update(self, metrics):
        ...         self.reason = "The loss is negative."
        ...         return read(metrics, "loss").item() < 0
        >>> Negative().update({"loss": -1.0})
        True

    Attributes:
        improved: Whether the last check was the best one so far. It says whose weights are worth keeping.
        reason: Why to stop, one sentence; empty as long as there is no reason.
    """

    identity_args: ClassVar[tuple[str, ...]] = ("monitor", "mode")
    improved: bool = False
    reason: str = ""

    @property
    @abc.abstractmethod
    def monitors(self) -> tuple[str, ...]:
        """The names of the metrics that are read."""

    @abc.abstractmethod
    def update(self, metrics: Metrics) -> bool:
        """Take in the metrics of a check.

        Args:
            metrics: Name to number or tensor of one element.

        Returns:
            Whether to stop.

        Raises:
            KeyError: If a metric is missing; the message names those that exist.
        """

    def reset(self) -> None:
        """Forget everything, as before the first check."""
        self.improved, self.reason = False, ""


class _OneMetric(Criterion):
    """A criterion that reads one metric, of which ``mode`` says which values are better."""

    monitor: str
    mode: str

    @property
    def monitors(self) -> tuple[str, ...]:
        return (self.monitor,)

    def _better(self, value: Tensor, than: float) -> bool:
        """Strictly better; compared in the dtype of ``value``, as Lightning does, and false for NaN."""
        return bool(value < than if self.mode == "min" else value > than)


class Plateau(_OneMetric):
    r"""Stop when a metric has not improved for ``patience`` checks.

    A value improves if it is better than the best one by more than ``min_delta``: :math:`v + \delta < best` in mode
    ``"min"``, :math:`v - \delta > best` in mode ``"max"``, computed in the metric's dtype. This is the rule of
    Lightning's ``EarlyStopping``: an improvement of exactly ``min_delta`` is none, and the best value stays where it is
    meanwhile, so that a slow drift counts as soon as it adds up. NaN is never an improvement. Slow criteria generalize
    better and cost more time (Prechelt, *Early stopping, but when?*, 1998).

    Args:
        monitor: The metric's name.
        patience: The number of checks without improvement after which to stop, >= 0; 0 is as 1. Default 3, as in
            Lightning.
        mode: ``"min"`` if less is better, ``"max"`` if more is. Default ``"min"``, for a loss.
        min_delta: What an improvement must exceed, >= 0, in the metric's unit. Default 0.

    Attributes:
        best: The best value so far; infinitely bad before the first.
        wait: The number of checks since.

    Raises:
        ValueError: If an argument is not one of its range.

    Example::

        >>> plateau = Plateau("val_loss", patience=2)
        >>> [plateau.update({"val_loss": loss}) for loss in (0.9, 0.7, 0.8, 0.7)]
        [False, False, False, True]
        >>> plateau.reason
        "Monitored metric 'val_loss' did not improve in the last 2 checks. Best score: 0.700."
    """

    best: float
    wait: int

    def __init__(self, monitor: str, patience: int = 3, mode: str = "min", min_delta: float = 0.0) -> None:
        check_number("patience", patience, low=0, integer=True)
        check_number("min_delta", min_delta, low=0.0)
        self.monitor, self.patience, self.mode, self.min_delta = monitor, patience, _checked(mode), min_delta
        self.reset()

    def update(self, metrics: Metrics) -> bool:
        value = read(metrics, self.monitor)
        delta = self.min_delta if self.mode == "min" else -self.min_delta
        self.improved = self._better(value + delta, self.best)
        self.best, self.wait = (value.item(), 0) if self.improved else (self.best, self.wait + 1)
        stop = not self.improved and self.wait >= self.patience
        told = f"{self.monitor!r} did not improve in the last {self.wait} checks. Best score: {self.best:.3f}."
        self.reason = f"Monitored metric {told}" if stop else ""
        return stop

    def reset(self) -> None:
        super().reset()
        self.best, self.wait = _worst(self.mode), 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "wait": self.wait}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.wait = state["best"], state["wait"]


class Threshold(_OneMetric):
    """Stop once a metric is good enough: strictly better than ``value``.

    Args:
        monitor: The metric's name.
        value: What must be exceeded.
        mode: ``"min"`` if less is better, ``"max"`` if more is. Default ``"min"``.

    Attributes:
        best: The best value so far among those that were good enough.

    Raises:
        ValueError: If an argument is not one of its range.

    Example::

        >>> threshold = Threshold("accuracy", 0.9, mode="max")
        >>> [threshold.update({"accuracy": accuracy}) for accuracy in (0.8, 0.9, 0.95)]
        [False, False, True]
    """

    best: float

    def __init__(self, monitor: str, value: float, mode: str = "min") -> None:
        check_number("value", value)
        self.monitor, self.value, self.mode = monitor, value, _checked(mode)
        self.reset()

    def update(self, metrics: Metrics) -> bool:
        value = read(metrics, self.monitor)
        stop = self._better(value, self.value)
        # The first value beyond the threshold is better than all before; a run that must go on may see worse ones.
        self.improved = stop and self._better(value, self.best)
        self.best = value.item() if self.improved else self.best
        told = f"{self.monitor!r} = {value.item()} {'<' if self.mode == 'min' else '>'} {self.value}."
        self.reason = f"Stopping threshold reached: {told}" if stop else ""
        return stop

    def reset(self) -> None:
        super().reset()
        self.best = _worst(self.mode)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


class Divergence(_OneMetric):
    """Stop once a metric is hopeless: strictly worse than ``value``.

    Args:
        monitor: The metric's name.
        value: What must not be exceeded.
        mode: ``"min"`` if less is better, so that more than ``value`` is hopeless; ``"max"`` the other way round.
            Default ``"min"``.

    Raises:
        ValueError: If an argument is not one of its range.

    Example::

        >>> divergence = Divergence("loss", 10.0)
        >>> [divergence.update({"loss": loss}) for loss in (3.0, 10.0, 11.0)]
        [False, False, True]
    """

    def __init__(self, monitor: str, value: float, mode: str = "min") -> None:
        check_number("value", value)
        self.monitor, self.value, self.mode = monitor, value, _checked(mode)

    def update(self, metrics: Metrics) -> bool:
        value = read(metrics, self.monitor)
        stop = self._better(-value, -self.value)
        told = f"{self.monitor!r} = {value.item()} {'>' if self.mode == 'min' else '<'} {self.value}."
        self.reason = f"Divergence threshold reached: {told}" if stop else ""
        return stop


class NonFinite(_OneMetric):
    """Stop when a metric is NaN or infinite.

    Args:
        monitor: The metric's name.

    Example::

        >>> criterion = NonFinite("loss")
        >>> criterion.update({"loss": float("nan")}), criterion.reason
        (True, "Monitored metric 'loss' = nan is not finite.")
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor

    def update(self, metrics: Metrics) -> bool:
        value = read(metrics, self.monitor).item()
        stop = not math.isfinite(value)
        self.reason = f"Monitored metric {self.monitor!r} = {value} is not finite." if stop else ""
        return stop


class AnyOf(Criterion):
    """Stop as soon as one of several criteria says so.

    They are asked in the order of the list, and those behind the first that stops are not: their best value and their
    patience stay as they were. Lightning's ``EarlyStopping`` is the order non-finite, threshold, divergence, plateau.

    Args:
        criteria: The criteria, at least one.

    Raises:
        ValueError: If ``criteria`` is not a list of criteria.

    Example::

        >>> both = AnyOf([NonFinite("loss"), Plateau("loss", patience=1)])
        >>> [both.update({"loss": loss}) for loss in (2.0, float("inf"), 1.0, 1.5)]
        [False, True, False, True]
    """

    identity_args = ("criteria",)

    def __init__(self, criteria: list[Criterion]) -> None:
        listed = isinstance(criteria, Sequence) and len(criteria) > 0
        if not listed or not all(isinstance(criterion, Criterion) for criterion in criteria):
            raise ValueError(f"`criteria` must be a list of at least one criterion, got {criteria!r}")
        self.criteria = list(criteria)

    @property
    def monitors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for criterion in self.criteria for name in criterion.monitors))

    def update(self, metrics: Metrics) -> bool:
        self.improved, self.reason = False, ""
        for criterion in self.criteria:
            stop = criterion.update(metrics)
            self.improved = self.improved or criterion.improved
            if stop:
                self.reason = criterion.reason
                return True
        return False

    def reset(self) -> None:
        super().reset()
        for criterion in self.criteria:
            criterion.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"criteria": [criterion.state_dict() for criterion in self.criteria]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for criterion, its_state in zip(self.criteria, state["criteria"], strict=True):
            criterion.load_state_dict(its_state)


class Best(Policy):
    r"""What "best" means for the weights that are kept: one metric, a weighted sum of several, or several by rank.

    Args:
        by: A metric's name; a dictionary of name to weight, for :math:`\sum_i a_i v_i`; or a list of names, of which a
            later one decides only where all before are equal.
        mode: ``"min"`` if less is better, ``"max"`` if more is; for a list of names also a list of modes. Default
            ``"min"``.

    Attributes:
        best: The best values so far, one for each rank; infinitely bad before the first.

    Raises:
        ValueError: If ``by`` or ``mode`` is none of these.

    Example::

        >>> best = Best({"loss": 1.0, "accuracy": -0.5})
        >>> best.better({"loss": 1.0, "accuracy": 0.5}), best.better({"loss": 1.0, "accuracy": 0.6})
        (True, True)
        >>> best = Best(["accuracy", "loss"], mode=["max", "min"])
        >>> best.better({"accuracy": 0.5, "loss": 1.0}), best.better({"accuracy": 0.5, "loss": 0.9})
        (True, True)
    """

    identity_args: ClassVar[tuple[str, ...]] = ("by", "mode")

    best: list[float]

    def __init__(self, by: str | dict[str, float] | list[str], mode: str | list[str] = "min") -> None:
        if not by or not isinstance(by, str | dict | list):
            raise ValueError(
                f"`by` must be a metric's name, a dictionary of name to weight or a list of names, got {by!r}"
            )
        for name, weight in by.items() if isinstance(by, dict) else ():
            check_number(f"by[{name!r}]", weight)
        ranks = len(by) if isinstance(by, list) else 1
        modes = mode if isinstance(mode, list) else [mode] * ranks
        if len(modes) != ranks:
            raise ValueError(f"`mode` must be one mode, or one for each name of `by`, got {mode!r} for {by!r}")
        self.by, self.mode = by, mode
        self._modes = [_checked(one) for one in modes]
        self.reset()

    @property
    def monitors(self) -> tuple[str, ...]:
        """The names of the metrics that are read."""
        return (self.by,) if isinstance(self.by, str) else tuple(self.by)

    def better(self, metrics: Metrics) -> bool:
        """Whether these metrics are strictly better than the best so far, which they then become. NaN is never better.

        Raises:
            KeyError: If a metric is missing; the message names those that exist.
        """
        values = [float(read(metrics, name)) for name in self.monitors]
        if isinstance(self.by, dict):
            values = [sum(weight * value for weight, value in zip(self.by.values(), values, strict=True))]
        better = not any(math.isnan(value) for value in values) and self._cost(values) < self._cost(self.best)
        self.best = values if better else self.best
        return better

    def _cost(self, values: list[float]) -> list[float]:
        """What is less where it is better; lists compare by rank."""
        return [value if mode == "min" else -value for value, mode in zip(values, self._modes, strict=True)]

    def reset(self) -> None:
        """Forget everything, as before the first check."""
        self.best = [_worst(mode) for mode in self._modes]

    def state_dict(self) -> dict[str, Any]:
        return {"best": list(self.best)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = list(state["best"])


def read(metrics: Metrics, name: str) -> Tensor:
    """The metric as a scalar tensor on the CPU, in its own dtype; fp64 for a plain number.

    Raises:
        KeyError: If it is missing; the message names those that exist.
    """
    if name not in metrics:
        raise KeyError(f"the metric {name!r} is not among those that were logged: {sorted(metrics)}")
    value = metrics[name]
    if isinstance(value, Tensor):
        return value.detach().squeeze().cpu()
    return torch.tensor(value, dtype=torch.float64)


def _checked(mode: str) -> str:
    if mode not in ("min", "max"):
        raise ValueError(f"`mode` must be 'min' or 'max', got {mode!r}")
    return mode


def _worst(mode: str) -> float:
    return math.inf if mode == "min" else -math.inf
