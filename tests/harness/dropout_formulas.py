"""Reference formulas of dropout, with masks that are fixed functions of place and step, the same on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import linear

from lightning_optim import ScheduledDropout
from tests.harness.reference_loop import Formula, Loop, Step


def pattern(features: int, step: int) -> Tensor:
    """Return the mask: three in four features are kept, in a pattern that depends on the step."""
    return torch.tensor([(3 * feature + step) % 4 != 0 for feature in range(features)])


def pattern_of_weights(shape: torch.Size, step: int) -> Tensor:
    """Return the mask of a matrix: two in three weights are kept, in a pattern that depends on the step."""
    return torch.tensor([[(row + column + step) % 3 != 0 for column in range(shape[1])] for row in range(shape[0])])


class FixedDraw:
    """Replace a callback's random mask by one of the patterns, at the callback's own count of steps."""

    def __init__(self, callback: ScheduledDropout) -> None:
        self.callback = callback

    def __call__(self, name: str, like: Tensor, rate: Any) -> Tensor:
        step = self.callback.steps[0]
        if self.callback.insert != "weight":
            return pattern(like.shape[1], step).to(like) / (1.0 - rate)
        kept = pattern_of_weights(like.shape, step)
        if isinstance(like, DTensor):
            return distribute_tensor(kept.to(like.dtype) / (1.0 - rate), like.device_mesh, like.placements)
        return kept.to(like) / (1.0 - rate)


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

    def _drop(self, module: torch.nn.Linear, args: tuple[Tensor], output: Tensor) -> Tensor:
        if self.batch != self.loop.outcome.seen:  # the rate is set when a batch starts
            self.batch = self.loop.outcome.seen
            self.rate = self.start * (1.0 - self.loop.steps[0] / (self.loop.total - 1))
        return output if self.rate == 0.0 else self._dropped(module, args[0], output)

    def _dropped(self, module: torch.nn.Linear, x: Tensor, output: Tensor) -> Tensor:
        kept = pattern(output.shape[1], self.loop.steps[0])
        return torch.where(kept, output / (1.0 - self.rate), 0.0).to(output.dtype)

    def before_step(self, step: Step) -> None:
        if self.loop.cell.optimizers == 1:  # with several it is logged without the optimizer's index
            step.logged[self.logged] = self.rate


class WeightDropout(Dropout):
    """Multiply the weights of the hidden layer by a mask over ``1 - rate``."""

    def _dropped(self, module: torch.nn.Linear, x: Tensor, output: Tensor) -> Tensor:
        kept = pattern_of_weights(module.weight.shape, self.loop.steps[0])
        return linear(x, torch.where(kept, module.weight / (1.0 - self.rate), 0.0), module.bias)
