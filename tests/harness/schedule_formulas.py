"""Reference formulas of schedules: functions of the step and of the number of steps in the run."""

from __future__ import annotations

import math
from collections.abc import Callable

from tests.harness.reference_loop import Formula, Step

Number = Callable[[int, int], float]


def linear(start: float, end: float) -> Number:
    return lambda step, total: start + (end - start) * step / (total - 1)


def cosine(start: float, end: float) -> Number:
    return lambda step, total: end + (start - end) * (1.0 + math.cos(math.pi * step / (total - 1))) / 2.0


def exponential(start: float, end: float) -> Number:
    return lambda step, total: start * (end / start) ** (step / (total - 1))


class Scheduled(Formula):
    """Make a formula without state anew at each step, with the scheduled number of that step."""

    def __init__(self, make: Callable[[float], Formula], number: Number) -> None:
        self.make = make
        self.number = number

    def before_step(self, step: Step) -> None:
        self.make(self.number(step.step, step.total)).before_step(step)

    def after_step(self, step: Step) -> None:
        self.make(self.number(step.step, step.total)).after_step(step)
