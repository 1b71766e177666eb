"""Reference formulas of penalties and projections, one row or one tensor at a time."""

from __future__ import annotations

from tests.harness.reference_loop import Formula, Step


class RowProducts(Formula):
    """Add the penalty ``strength * sum((r_i . r_j)^2)`` over all pairs of rows of a matrix."""

    def __init__(self, name: str, strength: float) -> None:
        self.name = name
        self.strength = strength

    def before_step(self, step: Step) -> None:
        value = 0.0
        for weight, grad in zip(step.weights, step.grads, strict=True):
            if weight.ndim < 2:
                continue
            for one, slope in zip(weight, grad, strict=True):
                for other in weight:
                    product = float((one * other).sum())
                    value += self.strength * product**2
                    slope += 4.0 * self.strength * product * other
        step.logged[f"regularization/{self.name}"] = value
