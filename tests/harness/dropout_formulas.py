"""Reference formula of dropout, with a mask that is a fixed function of feature and step, the same on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim import ScheduledDropout
from tests.harness.reference_loop import Formula, Loop, Step


def pattern(features: int, step: int) -> Tensor:
    """Return the mask: three in four features are kept, in a pattern that depends on the step."""
    return torch.tensor([(3 * feature + step) % 4 != 0 for feature in range(features)])


class FixedDraw:
    """Replace a callback's random mask by :func:`pattern` at the callback's own count of steps."""

    def __init__(self, callback: ScheduledDropout) -> None:
        self.callback = callback

    def __call__(self, name: str, like: Tensor, rate: float) -> Tensor:
        return pattern(like.shape[1], self.callback.steps[0]).to(like) / (1.0 - rate)


def fixed(callback: ScheduledDropout) -> ScheduledDropout:
    callback.draw = FixedDraw(callback)  # type: ignore[method-assign]
    return callback


class Dropout(Formula):
    """Multiply the hidden layer by a mask over ``1 - rate``; the rate falls from ``start`` to 0 over the run."""

    def __init__(self, start: float, logged: str) -> None:
        self.start = start
        self.logged = logged
        self.batch = -1
        self.rate = 0.0

    def attach(self, loop: Loop) -> None:
        self.loop = loop
        for net in loop.nets:
            net.get_submodule("inner").register_forward_hook(self._drop)

    def _drop(self, module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        if self.batch != self.loop.outcome.seen:  # the rate is set when a batch starts
            self.batch = self.loop.outcome.seen
            self.rate = self.start * (1.0 - self.loop.steps[0] / (self.loop.total - 1))
        if self.rate == 0.0:
            return output
        kept = pattern(output.shape[1], self.loop.steps[0])
        return torch.where(kept, output / (1.0 - self.rate), 0.0).to(output.dtype)

    def before_step(self, step: Step) -> None:
        if self.loop.cell.optimizers == 1:  # with several it is logged without the optimizer's index
            step.logged[self.logged] = self.rate
