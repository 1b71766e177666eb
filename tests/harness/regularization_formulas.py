"""Reference formulas of penalties and projections, one row or one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.harness.reference_loop import Formula, Step


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


class GroupNorms(Formula):
    """Add the penalty ``strength * sum(norm(group))`` over the rows or columns of a matrix; a vector is one group."""

    def __init__(
        self, name: str, strength: float, columns: bool = False, by_size: bool = False, everything: bool = False
    ) -> None:
        self.name = name
        self.strength = strength
        self.columns = columns
        self.by_size = by_size
        self.everything = everything

    def before_step(self, step: Step) -> None:
        value = 0.0
        for weight, grad in zip(step.weights, step.grads, strict=True):
            if weight.ndim < 2 and not self.everything:
                continue
            groups, slopes = [weight], [grad]
            if weight.ndim == 2:
                groups, slopes = (list(one.T if self.columns else one) for one in (weight, grad))
            for group, slope in zip(groups, slopes, strict=True):
                norm = (group * group).sum().sqrt()
                factor = self.strength * (group.numel() ** 0.5 if self.by_size else 1.0)
                value += float(factor * norm)
                slope += factor * group / norm
        step.logged[f"regularization/{self.name}"] = value


class RowProducts(Formula):
    """Add the penalty ``strength * sum((r_i . r_j)^2)`` over all pairs of rows of a matrix.

    With ``identity`` 1 is subtracted from the product of a row with itself, and of a matrix with more rows than columns
    the columns take the place of the rows.
    """

    def __init__(self, name: str, strength: float, identity: bool = False) -> None:
        self.name = name
        self.strength = strength
        self.identity = identity

    def before_step(self, step: Step) -> None:
        value = 0.0
        for weight, grad in zip(step.weights, step.grads, strict=True):
            if weight.ndim < 2:
                continue
            tall = self.identity and weight.shape[0] > weight.shape[1]
            rows, slopes = (weight.T, grad.T) if tall else (weight, grad)
            for i, (one, slope) in enumerate(zip(rows, slopes, strict=True)):
                for j, other in enumerate(rows):
                    product = float((one * other).sum()) - float(self.identity and i == j)
                    value += self.strength * product**2
                    slope += 4.0 * self.strength * product * other
        step.logged[f"regularization/{self.name}"] = value


class PullToStart(Formula):
    """Add the penalty ``strength * sum((w - w0)^2)`` on matrices, where w0 is the weight before the first step."""

    def __init__(self, name: str, strength: float) -> None:
        self.name = name
        self.strength = strength
        self.starts: dict[tuple[int, str], torch.Tensor] = {}

    def before_step(self, step: Step) -> None:
        value = 0.0
        for name, weight, grad in zip(step.names, step.weights, step.grads, strict=True):
            if weight.ndim < 2:
                continue
            start = self.starts.setdefault((step.optimizer, name), weight.clone())
            moved = weight - start
            value += float(self.strength * (moved * moved).sum())
            grad += 2.0 * self.strength * moved
        step.logged[f"regularization/{self.name}"] = value


class FourthPowers(Formula):
    """Add the penalty ``strength * sum(w^4)`` over all weights."""

    def __init__(self, name: str, strength: float) -> None:
        self.name = name
        self.strength = strength

    def before_step(self, step: Step) -> None:
        value = 0.0
        for weight, grad in zip(step.weights, step.grads, strict=True):
            value += float(self.strength * (weight * weight * weight * weight).sum())
            grad += 4.0 * self.strength * weight * weight * weight
        step.logged[f"regularization/{self.name}"] = value


class SoftThreshold(Formula):
    """Move each element of a matrix towards zero by ``lr * strength`` after each step, and not beyond zero."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def after_step(self, step: Step) -> None:
        for weight in step.weights:
            if weight.ndim >= 2:
                weight.copy_(torch.sign(weight) * torch.clamp(weight.abs() - step.lr * self.strength, min=0.0))


class Groups(Formula):
    """Multiply each row of a matrix, or each column with ``dim=1``, by a factor that is computed from its norm.

    Args:
        factor: Takes the norm of the group, the number of its weights and the learning rate.
        dim: Dimension that numbers the groups.
    """

    def __init__(self, factor: Callable[[float, int, float], float], dim: int = 0) -> None:
        self.factor = factor
        self.dim = dim

    def after_step(self, step: Step) -> None:
        for weight in step.weights:
            if weight.ndim < 2:
                continue
            for group in weight.unbind(self.dim):
                norm = float((group * group).sum()) ** 0.5
                group *= self.factor(norm, group.numel(), step.lr)


class Clamp(Formula):
    """Set the negative elements of matrices to zero after each step."""

    def after_step(self, step: Step) -> None:
        for weight in step.weights:
            if weight.ndim >= 2:
                weight[weight < 0.0] = 0.0


class Decay(Formula):
    """Multiply a matrix by ``1 - lr * strength`` before the step, as AdamW does.

    If cautious, subtract the same of the old matrix after the step, where the step did not move away from zero. With
    ``following=False`` the learning rate does not count.
    """

    def __init__(self, strength: float, cautious: bool = False, following: bool = True) -> None:
        self.strength = strength
        self.cautious = cautious
        self.following = following
        self.before: dict[tuple[int, str], torch.Tensor] = {}

    def _factor(self, step: Step) -> float:
        return (step.lr if self.following else 1.0) * self.strength

    def before_step(self, step: Step) -> None:
        for name, weight in zip(step.names, step.weights, strict=True):
            self.before[step.optimizer, name] = weight.clone()
            if weight.ndim >= 2 and not self.cautious:
                weight *= 1.0 - self._factor(step)

    def after_step(self, step: Step) -> None:
        for name, weight in zip(step.names, step.weights, strict=True):
            if weight.ndim < 2 or not self.cautious:
                continue
            for new, old in zip(weight.view(-1), self.before[step.optimizer, name].view(-1), strict=True):
                moves_away = (old - new) * old < 0.0
                if not moves_away:
                    new -= self._factor(step) * old


class Shrink(Formula):
    """Multiply the weights by ``factor`` after each step, as a user's callback in the registry does."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def after_step(self, step: Step) -> None:
        for weight in step.weights:
            weight *= self.factor
