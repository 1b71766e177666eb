"""Compare metrics: decide which value of one metric, or of several together, is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.base.metric_names import mode_of
from lightning_optim.base.policy import Policy, belongs_to
from lightning_optim.base.suggestions import nearest, shown

Metrics: TypeAlias = Mapping[str, "float | Tensor"]
Mode: TypeAlias = Literal["min", "max"]


def read(metrics: Metrics, name: str) -> Tensor:
    """Return a metric as a scalar tensor on the CPU, in its own dtype; fp64 for a plain number.

    Raises:
        KeyError: If it is missing; the message names those that exist.
    """
    if name not in metrics:
        raise KeyError(
            f"the metric {name!r} was not logged{nearest(name, metrics) or '.'} Logged metrics:"
            f" {shown(sorted(metrics))}"
        )
    value = metrics[name]
    if isinstance(value, Tensor):
        return value.detach().squeeze().cpu()
    return torch.tensor(value, dtype=torch.float64)


def initial_best(mode: Mode) -> float:
    """Return the initial best value: +inf for "min", -inf for "max"."""
    return math.inf if mode == "min" else -math.inf


def mode_argument(name: str) -> str:
    """Return ", mode='max'" for a line to write, if larger values are better by the metric's name; else nothing.

    Example::

        >>> mode_argument("val_acc"), mode_argument("val_loss")
        (", mode='max'", '')
    """
    return ", mode='max'" if mode_of(name) == "max" else ""


def check_monitor(monitor: Any, kind: str = "", argument: str = "", second: object = None) -> str:
    """Check that ``monitor`` is text, and return it; tell arguments that were swapped.

    Args:
        monitor: The argument.
        kind: Name of the class, for the line that should have been written.
        argument: Name of the number that comes after the metric's name.
        second: That number, as it was passed.

    Raises:
        ValueError: If ``monitor`` is no text, or if ``second`` is a mode or a metric's name.
    """
    modes = get_args(Mode)
    if isinstance(second, str) and (monitor in modes or not isinstance(monitor, str)):
        number = "value=…, " if argument == "value" and monitor in modes else ""
        line = f"{kind}({second!r}, {number}{'mode' if monitor in modes else argument}={monitor!r})"
        raise ValueError(f"`monitor` must be a metric's name, which comes first, got {monitor!r}: write {line}")
    if not isinstance(monitor, str):
        several = kind and isinstance(monitor, list | tuple) and all(isinstance(name, str) for name in monitor)
        rest = ", …" if argument == "value" else ""
        names = monitor if several else ()
        lines = ", ".join(f"{kind}({one!r}{rest}{mode_argument(one) if argument else ''})" for one in names)
        told = f": write AllOf([{lines}])" if lines else belongs_to(monitor, ())
        raise ValueError(f"`monitor` must be a metric's name, got {monitor!r}{told}")
    if isinstance(second, str) and second in modes:
        raise ValueError(f"`{argument}` must be a number, got {second!r}: write `mode={second!r}`")
    return monitor


class Best(Policy):
    r"""Decide which weights are best: by one metric, a weighted sum of several, or several by rank.

    Its messages name the argument as users pass it, ``best_by`` of :class:`~lightning_optim.EarlyStopping`.

    Args:
        by: A metric's name; a dictionary of name to weight, for :math:`\sum_i a_i v_i`; or a list of names, of which a
            later one decides only where all before are equal.
        mode: ``"min"`` if less is better, ``"max"`` if more is; for a list of names also a list of modes. Default
            ``"min"``.

    Attributes:
        best: Best values so far, one for each rank; infinitely bad before the first.
        modes: Mode of each of them.

    Raises:
        ValueError: If ``by`` or ``mode`` is not one of these.

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

    def __init__(self, by: str | dict[str, float] | list[str], mode: Mode | list[Mode] = "min") -> None:
        if not by or not isinstance(by, str | dict | list) or not all(isinstance(name, str) for name in by):
            raise ValueError(
                f"`best_by` must be a metric's name, a dictionary of name to weight or a list of names, got {by!r}"
            )
        for name, weight in by.items() if isinstance(by, dict) else ():
            check_number(f"best_by[{name!r}]", weight)
        ranks = len(by) if isinstance(by, list) else 1
        modes = mode if isinstance(mode, list) else [mode] * ranks
        if len(modes) != ranks:
            raise ValueError(f"`mode` must be one mode, or one for each name of `best_by`, got {mode!r} for {by!r}")
        self.by, self.mode = by, mode
        self.modes = [check_choice("mode", one, Mode) for one in modes]
        self.add_state("best", [initial_best(one) for one in self.modes])

    @property
    def monitors(self) -> tuple[str, ...]:
        """Names of the metrics that are read."""
        return (self.by,) if isinstance(self.by, str) else tuple(self.by)

    @property
    def in_words(self) -> str:
        if isinstance(self.by, dict):
            return " + ".join(f"{weight:g} * {name}" for name, weight in self.by.items()).replace("+ -", "- ")
        return ", ".join(self.monitors)

    def better(self, metrics: Metrics) -> bool:
        """Return True if the metrics are strictly better than the best so far, and keep them then; False for NaN.

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
        """Return numbers that are less where they are better; lists compare by rank."""
        return [value if mode == "min" else -value for value, mode in zip(values, self.modes, strict=True)]
