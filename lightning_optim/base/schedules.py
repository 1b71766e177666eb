"""Change a number over a run: schedules, pure functions of the optimizer step and of the number of steps."""

from __future__ import annotations

import abc
import math
from typing import Any

from lightning_optim.base.arguments import check_number
from lightning_optim.base.policy import Policy


class Schedule(Policy, abc.ABC):
    r"""Base class of numbers that are functions of the optimizer step. A policy takes one in place of a number.

    A schedule is a pure function, so it has no state and resumes by itself. Durations are fractions of training: step
    :math:`s` of :math:`n` is at the position :math:`s / (n - 1)`, so that the first step is at 0 and the last one,
    which is step :math:`n - 1`, at 1. A run of one step is at 0; steps after the last stay at 1.

    A new schedule is a subclass with :meth:`__call__`::

        >>> from lightning_optim.base import position
        >>> class Half(Schedule):
        ...     '''The value, and half of it from the middle of training on.'''
        ...     def __init__(self, value):
        ...         self.value = value
        ...     def __call__(self, step, total):
        ...         return self.value if position(step, total) < 0.5 else self.value / 2
        >>> [Half(1.0)(step, 4) for step in range(4)]
        [1.0, 1.0, 0.5, 0.5]

    For a Trainer: ``Trainer(callbacks=[WeightRegularization(L2(Half(1e-3)))])``.
    """

    used_in = "WeightRegularization(L2({}))"

    def _is_no_callback(self) -> str:
        return f"{self!r} is a schedule: write it in place of a number, such as {self.in_its_place}"

    @abc.abstractmethod
    def __call__(self, step: int, total: float) -> float:
        """Return the value at an optimizer step.

        Args:
            step: Number of optimizer steps that were made before this one.
            total: Number of optimizer steps in the run.
        """

    @property
    def constant(self) -> bool:
        """True if the value needs no total, so that it is known in a run without an end too."""
        return False

    @property
    def scheduled(self) -> bool:
        return not self.constant

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Smallest and largest value, by which arguments are checked; ``None`` if they are unknown."""
        return None


class Constant(Schedule):
    """Give the same value at every step.

    Args:
        value: The value.

    Raises:
        ValueError: If ``value`` is not a finite number.

    Example::

        >>> Constant(0.1)(step=7, total=10)
        0.1

    For a Trainer: ``Trainer(callbacks=[WeightRegularization(L2(Constant(1e-3)))])``.
    """

    def __init__(self, value: float) -> None:
        check_number("value", value)
        self.value = value

    def __call__(self, step: int, total: float = math.inf) -> float:
        return self.value

    @property
    def constant(self) -> bool:
        return True

    @property
    def bounds(self) -> tuple[float, float]:
        return self.value, self.value


class _Ramp(Schedule):
    """Give ``start`` before ``begin``, ``end`` after ``until``, and the value of :meth:`_between` in between."""

    def __init__(self, start: float, end: float, begin: float = 0.0, until: float = 1.0) -> None:
        check_number("start", start)
        check_number("end", end)
        check_number("begin", begin, low=0.0, high=1.0, high_open=True)
        check_number("until", until, low=begin, high=1.0, low_open=True)
        self.start, self.end, self.begin, self.until = start, end, begin, until

    def __call__(self, step: int, total: float) -> float:
        share = (position(step, total) - self.begin) / (self.until - self.begin)
        return self._between(min(max(share, 0.0), 1.0))

    @abc.abstractmethod
    def _between(self, share: float) -> float:
        """Return the value after this share of the way: exactly ``start`` at 0 and ``end`` at 1."""

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


class Linear(_Ramp):
    r"""Move in a straight line: :math:`(1 - u) \cdot start + u \cdot end`.

    :math:`u` runs from 0 to 1 between the positions ``begin`` and ``until``; before and after, the value stands still.
    With the defaults the first step has exactly ``start`` and the last one exactly ``end``.

    Args:
        start: The value up to ``begin``.
        end: The value from ``until`` on.
        begin: Position at which the value begins to move, a fraction of training in [0, 1). Default 0, the first step.
        until: Position at which it arrives, a fraction of training in (begin, 1]. Default 1, the last step.

    Raises:
        ValueError: If an argument is not a number of its range; when called, if ``total`` is not finite.

    Example::

        >>> [Linear(1.0, 0.0)(step, total=5) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
        >>> [Linear(1.0, 0.0, until=0.5)(step, total=5) for step in range(5)]
        [1.0, 0.5, 0.0, 0.0, 0.0]

    For a Trainer: ``Trainer(callbacks=[WeightRegularization(L2(Linear(1e-3, 0.0)))])``.
    """

    def _between(self, share: float) -> float:
        return (1.0 - share) * self.start + share * self.end


class Cosine(_Ramp):
    r"""Move along half a period of a cosine, flat at both ends: :math:`end + (start - end) \cdot (1 + \cos \pi u) / 2`.

    :math:`u` and the arguments are those of :class:`Linear`.

    Args:
        start: The value up to ``begin``.
        end: The value from ``until`` on.
        begin: Position at which the value begins to move, a fraction of training in [0, 1). Default 0, the first step.
        until: Position at which it arrives, a fraction of training in (begin, 1]. Default 1, the last step.

    Raises:
        ValueError: If an argument is not a number of its range; when called, if ``total`` is not finite.

    Example::

        >>> [round(Cosine(1.0, 0.0)(step, total=5), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]

    For a Trainer: ``Trainer(callbacks=[WeightRegularization(L2(Cosine(1e-3, 0.0)))])``.
    """

    def _between(self, share: float) -> float:
        share = (1.0 - math.cos(math.pi * share)) / 2.0
        return (1.0 - share) * self.start + share * self.end


class Exponential(_Ramp):
    r"""Multiply by the same factor at every step: :math:`start^{1-u} \cdot end^{u}`.

    :math:`u` and the arguments are those of :class:`Linear`, except that both values are positive.

    Args:
        start: The value up to ``begin``, positive.
        end: The value from ``until`` on, positive.
        begin: Position at which the value begins to move, a fraction of training in [0, 1). Default 0, the first step.
        until: Position at which it arrives, a fraction of training in (begin, 1]. Default 1, the last step.

    Raises:
        ValueError: If an argument is not a number of its range; when called, if ``total`` is not finite.

    Example::

        >>> [round(Exponential(1.0, 0.01)(step, total=3), 6) for step in range(3)]
        [1.0, 0.1, 0.01]

    For a Trainer: ``Trainer(callbacks=[WeightRegularization(L2(Exponential(1e-3, 1e-5)))])``.
    """

    def __init__(self, start: float, end: float, begin: float = 0.0, until: float = 1.0) -> None:
        check_number("start", start, low=0.0, low_open=True)
        check_number("end", end, low=0.0, low_open=True)
        super().__init__(start, end, begin, until)

    def _between(self, share: float) -> float:
        return float(self.start ** (1.0 - share) * self.end**share)


class Piecewise(Schedule):
    """Hold each value from its fraction of training on, until the next one.

    Args:
        values: Fraction of training in [0, 1] to value; one fraction is 0. In YAML ``{0: 0.1, 0.5: 0.01}``; text keys,
            which are all that JSON has, are read as numbers.

    Raises:
        ValueError: If a fraction or a value is not a number of its range, or none is 0; when called, if ``total`` is
            not finite.

    Example::

        >>> [Piecewise({0.0: 1.0, 0.5: 0.1})(step, total=5) for step in range(5)]
        [1.0, 1.0, 0.1, 0.1, 0.1]

    For a Trainer: ``Trainer(callbacks=[ScheduledDropout({"head.*": Piecewise({0.0: 0.1, 0.2: 0.0})})])``.
    """

    def __init__(self, values: dict[float, float]) -> None:
        if not isinstance(values, dict) or not values:
            raise ValueError(f"`values` must be a dictionary of fraction of training to value, got {values!r}")
        self.values = {
            _fraction(key): value for key, value in sorted(values.items(), key=lambda item: _fraction(item[0]))
        }
        if 0.0 not in self.values:
            raise ValueError(f"`values` must have a value that holds from the fraction 0 on, got {values!r}")
        for fraction, value in self.values.items():
            check_number(f"values[{fraction}]", value)

    def __call__(self, step: int, total: float) -> float:
        now = position(step, total)
        return next(value for fraction, value in reversed(self.values.items()) if fraction <= now)

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.values.values()), max(self.values.values())


def _fraction(key: Any) -> float:
    try:
        fraction = float(key) if isinstance(key, str) else key
    except ValueError:
        fraction = key
    check_number("fraction in values", fraction, low=0.0, high=1.0)
    return float(fraction)


def position(step: int, total: float) -> float:
    """Return the position of a step in training: ``step / (total - 1)``, in [0, 1].

    Args:
        step: Number of optimizer steps made before.
        total: Number of optimizer steps in the run, finite and at least 1.

    Raises:
        ValueError: If ``total`` is not finite, since a schedule that moves needs an end, or below 1.

    Example::

        >>> position(0, 5), position(4, 5), position(0, 1)
        (0.0, 1.0, 0.0)
    """
    if not 1 <= total < math.inf:
        raise ValueError(
            f"`total` must be a finite number of optimizer steps >= 1 for a schedule that moves, got {total!r}"
        )
    return min(step / max(total - 1, 1), 1.0)


def value_at(number: float | Schedule, step: int, total: float) -> float:
    """Return the value of a number or of a schedule at an optimizer step.

    Example::

        >>> from lightning_optim import Linear
        >>> value_at(0.1, step=1, total=3), value_at(Linear(1.0, 0.0), step=1, total=3)
        (0.1, 0.5)
    """
    return number(step, total) if isinstance(number, Schedule) else number
