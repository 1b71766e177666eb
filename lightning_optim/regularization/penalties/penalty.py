"""Define the base class of penalties: terms of the loss that depend on the weights alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.base import foreach, shards
from lightning_optim.base.dtypes import without_autocast
from lightning_optim.base.policy import ParameterPolicy


class Penalty(ParameterPolicy):
    """Base class of terms of the loss that depend on the weights alone. They act before the optimizer step.

    The gradient is added in closed form, so it needs no autograd graph and no factor for accumulation or a loss scale:
    it is added once per optimizer step, to gradients that are whole and unscaled.

    A new penalty is a subclass with ``_value`` and ``_add_grad_``, the formula and its derivative::

        >>> from lightning_optim.base import local_shards
        >>> class Sum(Penalty):
        ...     '''The sum of all weights.'''
        ...     def _value(self, weights):
        ...         return sum(weight.sum() for weight in weights)
        ...     def _add_grad_(self, weights, grads):
        ...         torch._foreach_add_(local_shards(grads), 1.0)
        >>> weight, grad = torch.tensor([1.0, 2.0]), torch.zeros(2)
        >>> Sum().add_grad_([weight], [grad])
        >>> Sum().value([weight]), grad
        (tensor(3.), tensor([1., 1.]))

    Args:
        on: The parameters that are penalized, for :func:`~lightning_optim.base.select`; ``None`` takes those with two
            dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    For a Trainer: ``Trainer(callbacks=[WeightRegularization(Sum())])``.
    """

    used_in = "WeightRegularization({})"
    decays: bool = False
    """True if it pulls each weight towards zero in proportion to the weight, as an optimizer's weight decay does."""
    elementwise: ClassVar[bool] = False
    """True if the gradient of each element depends on this element alone: then several penalties share one pass."""
    formulas = (("_value", "value"), ("_add_grad_", "add_grad_"))

    @without_autocast
    def value(self, weights: Sequence[Tensor], *, step: int = 0, total: float = math.inf) -> Tensor:
        """Return the penalty: a scalar in fp32 or better on the device of the first weight, the same on all ranks.

        Args:
            weights: Tensors of any shape, plain or DTensors.
            step: Number of optimizer steps made before, for schedules.
            total: Number of optimizer steps in the run, for schedules.
        """
        self._at(step, total)
        return self._value(weights)

    @torch.no_grad()
    @without_autocast
    def add_grad_(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], *, step: int = 0, total: float = math.inf
    ) -> None:
        """Add the derivative of :meth:`value` to the gradients, in place.

        Args:
            weights: Tensors of any shape, plain or DTensors.
            grads: Their gradients, in the same order and with the same placements.
            step: Number of optimizer steps made before, for schedules.
            total: Number of optimizer steps in the run, for schedules.
        """
        if weights:
            self._at(step, total)
            self._add_grad_(weights, grads)

    def _value(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the penalty; to be overridden."""
        raise NotImplementedError(f"{type(self).__name__} has no `_value(self, weights)`")

    def _add_grad_(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Add the derivative to the gradients in place; to be overridden. There is at least one weight."""
        raise NotImplementedError(f"{type(self).__name__} has no `_add_grad_(self, weights, grads)`")


@torch.no_grad()
@without_autocast
def add_grads_(
    penalties: Sequence[Penalty],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    step: int = 0,
    total: float = math.inf,
) -> None:
    """Add the derivatives of several penalties on the same weights to the gradients, in place.

    Those that are elementwise add theirs piece by piece, so that weights and gradients are read from memory once.

    Args:
        penalties: The penalties.
        weights: Tensors of any shape, plain or DTensors.
        grads: Their gradients, in the same order and with the same placements.
        step: Number of optimizer steps made before, for schedules.
        total: Number of optimizer steps in the run, for schedules.
    """
    together = [penalty for penalty in penalties if _is_elementwise(penalty)]
    if together:
        for some_weights, some_grads in foreach.chunks(shards.local_shards(weights), shards.local_shards(grads)):
            for penalty in together:
                penalty.add_grad_(some_weights, some_grads, step=step, total=total)
    for penalty in penalties:
        if penalty not in together:
            penalty.add_grad_(weights, grads, step=step, total=total)


def _is_elementwise(penalty: Penalty) -> bool:
    """Return :attr:`Penalty.elementwise` of the class that has the formula: a subclass may have another one."""
    definer = next(cls for cls in type(penalty).__mro__ if "_add_grad_" in vars(cls))
    return bool(vars(definer).get("elementwise", False))
