"""Criteria of when to stop, on numbers that were logged, and of which weights to keep."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.base.arguments import check_number
from lightning_optim.base.policy import Policy

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

    def better(self, value: Tensor, than: float) -> bool:
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
        self.monitor, self.mode = named(monitor), checked(mode)
        self.patience, self.min_delta = patience, min_delta
        self.reset()

    def update(self, metrics: Metrics) -> bool:
        value = read(metrics, self.monitor)
        delta = self.min_delta if self.mode == "min" else -self.min_delta
        self.improved = self.better(value + delta, self.best)
        self.best, self.wait = (value.item(), 0) if self.improved else (self.best, self.wait + 1)
        stop = not self.improved and self.wait >= self.patience
        told = f"{self.monitor!r} did not improve in the last {self.wait} checks. Best score: {self.best:.3f}."
        self.reason = f"Monitored metric {told}" if stop else ""
        return stop

    def reset(self) -> None:
        super().reset()
        self.best, self.wait = worst(self.mode), 0

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
        self.monitor, self.value, self.mode = named(monitor), value, checked(mode)
        self.reset()

    def update(self, metrics: Metrics) -> bool:
        value = read(metrics, self.monitor)
        stop = self.better(value, self.value)
        # The first value beyond the threshold is better than all before; a run that must go on may see worse ones.
        self.improved = stop and self.better(value, self.best)
        self.best = value.item() if self.improved else self.best
        told = f"{self.monitor!r} = {value.item()} {'<' if self.mode == 'min' else '>'} {self.value}."
        self.reason = f"Stopping threshold reached: {told}" if stop else ""
        return stop

    def reset(self) -> None:
        super().reset()
        self.best = worst(self.mode)

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
        self.monitor, self.value, self.mode = named(monitor), value, checked(mode)

    def update(self, metrics: Metrics) -> bool:
        value = read(metrics, self.monitor)
        stop = self.better(-value, -self.value)
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
        self.monitor = named(monitor)

    def update(self, metrics: Metrics) -> bool:
        value = read(metrics, self.monitor).item()
        stop = not math.isfinite(value)
        self.reason = f"Monitored metric {self.monitor!r} = {value} is not finite." if stop else ""
        return stop


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


def named(monitor: str) -> str:
    """``monitor``, if it is a name."""
    if not isinstance(monitor, str):
        raise ValueError(f"`monitor={monitor!r}` must be a metric's name")
    return monitor


def checked(mode: str) -> str:
    """``mode``, if it is one."""
    if mode not in ("min", "max"):
        raise ValueError(f"`mode` must be 'min' or 'max', got {mode!r}")
    return mode


def worst(mode: str) -> float:
    """What any value is better than."""
    return math.inf if mode == "min" else -math.inf
