"""Reference formulas of the techniques, as in their papers or manuals, for the reference loop.

They are written to be read, one number or one tensor at a time, and share no code with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.harness.reference_loop import Formula, Step, Weights


class Accumulate(Formula):
    """Accumulate windows of ``n`` micro-batches, or of ``schedule[epoch]`` from that epoch on."""

    def __init__(self, schedule: dict[int, int]) -> None:
        self.schedule = schedule

    def window(self, accumulation: int, epoch: int) -> int:
        return [n for first, n in sorted(self.schedule.items()) if first <= epoch][-1]


class Penalize(Formula):
    """Add the penalty ``l1 * sum(|w|) + l2 * sum(w^2)``, whose gradient is ``l1 * sign(w) + 2 * l2 * w``."""

    def __init__(self, name: str, l1: float = 0.0, l2: float = 0.0, everything: bool = False) -> None:
        self.name = name
        self.l1 = l1
        self.l2 = l2
        self.everything = everything

    def before_step(self, step: Step) -> None:
        value = 0.0
        for weight, grad in zip(step.weights, step.grads, strict=True):
            if weight.ndim < 2 and not self.everything:
                continue
            value += float(self.l1 * weight.abs().sum() + self.l2 * (weight * weight).sum())
            grad += self.l1 * torch.sign(weight) + 2.0 * self.l2 * weight
        step.logged[f"regularization/{self.name}"] = value


class ClipNorm(Formula):
    """Multiply gradients by ``min(1, max_norm / (norm + 1e-6))``; the norm is over all of this optimizer."""

    def __init__(self, max_norm: float, norm_type: float = 2.0) -> None:
        self.max_norm = max_norm
        self.norm_type = norm_type

    def before_step(self, step: Step) -> None:
        values = torch.cat([grad.flatten() for grad in step.grads]).abs()
        if math.isinf(self.norm_type):
            norm = float(values.max())
        else:
            norm = float((values**self.norm_type).sum() ** (1.0 / self.norm_type))
        for grad in step.grads:
            grad *= min(1.0, self.max_norm / (norm + 1e-6))
        step.logged["gradients/norm"] = norm


class ClipValue(Formula):
    """Clamp every element of a gradient to ``[-value, value]``."""

    def __init__(self, value: float, logs: bool = True) -> None:
        self.value = value
        self.logs = logs

    def before_step(self, step: Step) -> None:
        if self.logs:
            values = torch.cat([grad.flatten() for grad in step.grads])
            step.logged["gradients/norm"] = float((values * values).sum().sqrt())
        for grad in step.grads:
            grad[grad > self.value] = self.value
            grad[grad < -self.value] = -self.value


class Average(Formula):
    """Update ``average += (1 - d) * (w - average)`` with ``d = min(decay, 1 - (1 + t)^(-2/3))^every``.

    ``t`` counts the steps since the first update, so that the first update copies.
    """

    def __init__(self, decay: float, every: int = 1) -> None:
        self.decay = decay
        self.every = every
        self.average: Weights = {}

    def after_step(self, step: Step) -> None:
        if step.step % self.every:
            return
        decay = min(self.decay, 1.0 - (1.0 + step.step) ** (-2.0 / 3.0)) ** self.every
        for name, weight in zip(step.names, step.weights, strict=True):
            before = self.average.get(name, weight)
            self.average[name] = before + (1.0 - decay) * (weight - before)

    def evaluated(self, weights: Weights) -> Weights:
        return self.average or weights

    def final(self, weights: Weights) -> Weights:
        return self.evaluated(weights)


class Stop(Formula):
    """Stop when the score was not below its best for ``patience`` validations, and end with the best weights."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = math.inf
        self.waited = 0
        self.kept: Weights = {}

    def stop(self, score: float, weights: Weights) -> bool:
        self.waited += 1
        if score < self.best:
            self.best, self.waited = score, 0
            self.kept = {name: weight.clone() for name, weight in weights.items()}
        return self.waited >= self.patience

    def final(self, weights: Weights) -> Weights:
        return self.kept or weights


class Shrink(Formula):
    """Multiply the weights by ``factor`` after each step, as a user's callback in the registry does."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def after_step(self, step: Step) -> None:
        for weight in step.weights:
            weight *= self.factor


class SoftThreshold(Formula):
    """Move each element of a matrix towards zero by ``lr * strength`` after each step, and not beyond zero."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def after_step(self, step: Step) -> None:
        for weight in step.weights:
            if weight.ndim >= 2:
                weight.copy_(torch.sign(weight) * torch.clamp(weight.abs() - step.lr * self.strength, min=0.0))


def deviation(one: Weights, other: Weights) -> dict[str, float]:
    """Return the largest ``|a - b| / (1 + |b|)`` of each name; infinity if there is a NaN."""
    assert one.keys() == other.keys(), f"names differ: {sorted(one.keys() ^ other.keys())}"
    return {name: _deviation(one[name], other[name]) for name in one}


def _deviation(a: Tensor, b: Tensor) -> float:
    largest = float(((a - b).abs() / (1.0 + b.abs())).max())
    return math.inf if math.isnan(largest) else largest
