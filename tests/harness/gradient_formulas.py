"""Reference formulas that change gradients before a step: one number, one row or one tensor at a time."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from tests.harness.reference_loop import Formula, Step


class Accumulate(Formula):
    """Accumulate windows of ``n`` micro-batches, or of ``schedule[epoch]`` from that epoch on."""

    def __init__(self, schedule: dict[int, int]) -> None:
        self.schedule = schedule

    def window(self, accumulation: int, epoch: int) -> int:
        return [n for first, n in sorted(self.schedule.items()) if first <= epoch][-1]


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


class ByName(Formula):
    """Apply to each gradient the formula of the first text that is a part of its name; log the norm of all."""

    def __init__(self, formulas: dict[str, Formula]) -> None:
        self.by_name = formulas

    def before_step(self, step: Step) -> None:
        step.logged["gradients/norm"] = _size(step.grads)
        first = [next((text for text in self.by_name if text in name), None) for name in step.names]
        for text, formula in self.by_name.items():
            places = [place for place, found in enumerate(first) if found == text]
            names, weights, grads = (
                [values[place] for place in places] for values in (step.names, step.weights, step.grads)
            )
            formula.before_step(dataclasses.replace(step, names=names, weights=weights, grads=grads, logged={}))


class ByOptimizer(Formula):
    """Apply to each optimizer the formula at its index."""

    def __init__(self, *formulas: Formula) -> None:
        self.by_optimizer = formulas

    def before_step(self, step: Step) -> None:
        self.by_optimizer[step.optimizer].before_step(step)


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


class Spike(Formula):
    """Add the penalty ``strength * sum(w^2)`` on matrices late in the run, so that gradient norms rise suddenly."""

    def __init__(self, strength: float, start: float) -> None:
        self.strength = strength
        self.start = start

    def before_step(self, step: Step) -> None:
        if step.step / (step.total - 1) >= self.start:
            for weight, grad in zip(step.weights, step.grads, strict=True):
                if weight.ndim >= 2:
                    grad += 2.0 * self.strength * weight


class RowClip(Formula):
    """Clip each row of a gradient to ``share`` times the norm of its weights, or ``eps``; a vector is one row."""

    def __init__(self, share: float, eps: float = 1e-3) -> None:
        self.share = share
        self.eps = eps

    def before_step(self, step: Step) -> None:
        for weight, grad in zip(step.weights, step.grads, strict=True):
            rows = list(zip(weight, grad, strict=True)) if weight.ndim >= 2 else [(weight, grad)]
            for w, g in rows:
                limit = self.share * max(float(w.norm()), self.eps)
                if float(g.norm()) > limit:
                    g *= limit / float(g.norm())


class RowMean(Formula):
    """Subtract from each row of a matrix's gradient its mean."""

    def before_step(self, step: Step) -> None:
        for grad in step.grads:
            if grad.ndim >= 2:
                for row in grad:
                    row -= float(row.sum()) / row.numel()


class Draw(Formula):
    """Add Gaussian noise of variance ``eta / (1 + t)^gamma`` from a generator that one draw seeds in each step."""

    def __init__(self, eta: float, gamma: float) -> None:
        self.eta = eta
        self.gamma = gamma
        self.generators: dict[int, torch.Generator] = {}

    def before_step(self, step: Step) -> None:
        own = self.generators.setdefault(step.optimizer, torch.Generator().manual_seed(step.optimizer))
        draws = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=own)))
        for grad in step.grads:
            grad += (self.eta / (1.0 + step.step) ** self.gamma) ** 0.5 * torch.randn(grad.shape, generator=draws)


class AddMean(Formula):
    """Add to each gradient ``strength`` times the exponential mean of the gradients of its weight so far."""

    def __init__(self, decay: float, strength: float) -> None:
        self.decay = decay
        self.strength = strength
        self.means: dict[tuple[int, int], Tensor] = {}

    def before_step(self, step: Step) -> None:
        for index, grad in enumerate(step.grads):
            before = self.means.get((step.optimizer, index), torch.zeros_like(grad))
            self.means[step.optimizer, index] = mean = self.decay * before + (1.0 - self.decay) * grad
            grad += self.strength * mean


class PercentileClip(Formula):
    """Clip the norm of each gradient to a percentile of its norms so far, including this one."""

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self.norms: dict[tuple[int, int], list[float]] = {}

    def before_step(self, step: Step) -> None:
        for index, grad in enumerate(step.grads):
            norms = self.norms.setdefault((step.optimizer, index), [])
            norm = float(grad.norm())
            norms.append(norm)
            ordered = sorted(norms)
            position = self.percentile / 100.0 * (len(ordered) - 1)
            low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
            bound = low + (position - math.floor(position)) * (high - low)
            grad *= min(1.0, bound / (norm + 1e-6))


class ScoreClip(Formula):
    """Clip the global norm to ``mean + deviation * z^2 / score`` if its score is above ``z``."""

    def __init__(self, z: float, decay: float, warmup: int) -> None:
        self.z = z
        self.decay = decay
        self.warmup = warmup
        self.first: dict[int, list[float]] = {}
        self.mean: dict[int, float] = {}
        self.variance: dict[int, float] = {}

    def before_step(self, step: Step) -> None:
        which, first = step.optimizer, self.first.setdefault(step.optimizer, [])
        norm = float(torch.cat([grad.flatten() for grad in step.grads]).norm())
        if len(first) < self.warmup:
            first.append(norm)
            self.mean[which] = sum(first) / len(first)
            self.variance[which] = sum((n - self.mean[which]) ** 2 for n in first) / len(first)
            return
        deviation = self.variance[which] ** 0.5 + 1e-6
        score = (norm - self.mean[which]) / deviation
        after = norm
        if score > self.z:
            after = self.mean[which] + deviation * self.z**2 / score
            for grad in step.grads:
                grad *= min(1.0, after / (norm + 1e-6))
        self.mean[which] = self.decay * self.mean[which] + (1.0 - self.decay) * after
        self.variance[which] = self.decay * self.variance[which] + (1.0 - self.decay) * (after - self.mean[which]) ** 2


class Measure(Formula):
    """Log the norms before and after another formula, the share of steps that it clipped, and the update ratio."""

    def __init__(self, clipping: Formula) -> None:
        self.clipping = clipping
        self.clipped: dict[int, list[bool]] = {}
        self.before: list[Tensor] = []

    def before_step(self, step: Step) -> None:
        norm = _size(step.grads)
        self.clipping.before_step(step)
        step.logged["gradients/norm"] = norm
        step.logged["gradients/norm_clipped"] = after = _size(step.grads)
        flags = self.clipped.setdefault(step.optimizer, [])
        flags.append(after < norm * (1.0 - 1e-6))
        step.logged["gradients/share_clipped"] = sum(flags) / len(flags)
        step.logged["gradients/skipped"] = 0.0
        self.before = [weight.clone() for weight in step.weights]

    def after_step(self, step: Step) -> None:
        moves = [weight - before for weight, before in zip(step.weights, self.before, strict=True)]
        step.logged["gradients/update_ratio"] = _size(moves) / _size(self.before)


def _size(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).square().sum().sqrt())
