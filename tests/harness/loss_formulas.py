"""Reference formulas of what changes the loss of a micro-batch, or adds a term to it."""

from __future__ import annotations

from torch import Tensor

from tests.harness.reference_loop import Formula, Loop


class Flood(Formula):
    """Minimize ``|loss - level| + level``; the level is ``low``, and ``high`` from the middle of the run on."""

    def __init__(self, low: float, high: float) -> None:
        self.low = low
        self.high = high
        self.batch = -1
        self.level = low

    def attach(self, loop: Loop) -> None:
        self.loop = loop

    def loss(self, loss: Tensor, index: int) -> Tensor:
        if self.batch != self.loop.outcome.seen:  # the level is set when a batch starts
            self.batch = self.loop.outcome.seen
            self.level = self.low if self.loop.steps[0] / (self.loop.total - 1) < 0.5 else self.high
        return (loss - self.level).abs() + self.level
