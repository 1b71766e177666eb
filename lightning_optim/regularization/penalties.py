"""Penalties on weights: what is added to the loss, as a value and as a gradient in closed form."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.base import foreach, shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.norms import total_norm
from lightning_optim.base.policy import Policy
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.base.selection import Selector


class Penalty(Policy, abc.ABC):
    """A term of the loss that depends on the weights alone. It acts before the optimizer step.

    Its gradient is added in closed form, so it needs no autograd graph and no factor for accumulation or a loss scale:
    it is added once per optimizer step, to gradients that are whole and unscaled.

    A new penalty is a subclass with :meth:`value` and :meth:`add_grad_`::

        >>> class Sum(Penalty):
        ...     def value(self, weights, *, step=0, total=math.inf):
        ...         return sum(weight.sum() for weight in weights)
        ...     def add_grad_(self, weights, grads, *, step=0, total=math.inf):
        ...         torch._foreach_add_(shards.local_shards(grads), 1.0)
        >>> weight, grad = torch.tensor([1.0, 2.0]), torch.zeros(2)
        >>> Sum().add_grad_([weight], [grad])
        >>> Sum().value([weight]), grad
        (tensor(3.), tensor([1., 1.]))

    Attributes:
        on: The parameters that are penalized, for :func:`~lightning_optim.base.selection.select`;
            ``None`` takes those with
            two dimensions or more.
        exclude: What is left out of them, in the same terms.
    """

    on: Selector | Sequence[Selector] | None = None
    exclude: Selector | Sequence[Selector] | None = None

    @abc.abstractmethod
    def value(self, weights: Sequence[Tensor], *, step: int = 0, total: float = math.inf) -> Tensor:
        """The penalty, a scalar in fp32 or better on the device of the first weight, the same on all ranks.

        Args:
            weights: Tensors of any shape, plain or DTensors.
            step: The number of optimizer steps made before, for schedules.
            total: The number of optimizer steps in the run, for schedules.
        """

    @abc.abstractmethod
    def add_grad_(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], *, step: int = 0, total: float = math.inf
    ) -> None:
        """Add the derivative of :meth:`value` to the gradients, in place.

        Args:
            weights: Tensors of any shape, plain or DTensors.
            grads: Their gradients, in the same order and with the same placements.
            step: The number of optimizer steps made before, for schedules.
            total: The number of optimizer steps in the run, for schedules.
        """


class L1(Penalty):
    r"""The sum of absolute values: :math:`s \sum |w|`, with the gradient :math:`s \cdot \mathrm{sign}(w)`.

    It draws every weight towards zero with the same force. By gradients alone weights come near zero, and never stay
    there.

    Args:
        strength: The factor :math:`s \ge 0`; typical are 1e-6 to 1e-4, since it multiplies a sum over all weights.
        on: The parameters that are penalized: a glob over names, a module class, a predicate, or a list of these.
            Default: those with two dimensions or more, since biases and the scales of normalization layers do not
            overfit. ``"*"`` takes all, as the textbook does. In YAML the key needs quotes, ``"on": "*"``, since a bare
            ``on`` is read as true there.
        exclude: What is left out of them, in the same terms.

    Raises:
        ValueError: If ``strength`` is not a number >= 0 or a schedule of such numbers.

    Example::

        >>> weight = torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, 3.0]])
        >>> grad = torch.zeros(2, 3)
        >>> penalty = L1(0.1)
        >>> penalty.add_grad_([weight], [grad])
        >>> penalty.value([weight]), grad
        (tensor(0.9000), tensor([[-0.1000, -0.1000,  0.0000],
                [ 0.1000,  0.1000,  0.1000]]))
    """

    def __init__(
        self,
        strength: float | Schedule,
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        check_number("strength", strength, low=0.0, schedule=True)
        self.strength, self.on, self.exclude = strength, on, exclude

    def value(self, weights: Sequence[Tensor], *, step: int = 0, total: float = math.inf) -> Tensor:
        return value_at(self.strength, step, total) * total_norm(weights, 1.0)

    @torch.no_grad()
    def add_grad_(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], *, step: int = 0, total: float = math.inf
    ) -> None:
        _add_signs_(weights, grads, value_at(self.strength, step, total))


class L2(Penalty):
    r"""The sum of squares: :math:`s \sum w^2`, without a half, with the gradient :math:`2 s w`.

    ``torch.optim.SGD(weight_decay=d)`` is :math:`s = d / 2`. Under Adam a penalty is not weight decay, since its
    gradient is divided by the root of the second moment like any other (AdamW, arXiv:1711.05101).

    Args:
        strength: The factor :math:`s \ge 0`; typical are 1e-5 to 1e-3.
        on: The parameters that are penalized: a glob over names, a module class, a predicate, or a list of these.
            Default: those with two dimensions or more, since biases and the scales of normalization layers do not
            overfit. ``"*"`` takes all, as the textbook does. In YAML the key needs quotes, ``"on": "*"``, since a bare
            ``on`` is read as true there.
        exclude: What is left out of them, in the same terms.

    Raises:
        ValueError: If ``strength`` is not a number >= 0 or a schedule of such numbers.

    Example::

        >>> weight = torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, 3.0]])
        >>> grad = torch.zeros(2, 3)
        >>> penalty = L2(0.1)
        >>> penalty.add_grad_([weight], [grad])
        >>> penalty.value([weight]), grad
        (tensor(1.9000), tensor([[-0.4000, -0.2000,  0.0000],
                [ 0.2000,  0.4000,  0.6000]]))
    """

    def __init__(
        self,
        strength: float | Schedule,
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        check_number("strength", strength, low=0.0, schedule=True)
        self.strength, self.on, self.exclude = strength, on, exclude

    def value(self, weights: Sequence[Tensor], *, step: int = 0, total: float = math.inf) -> Tensor:
        return value_at(self.strength, step, total) * total_norm(weights, 2.0).square()

    @torch.no_grad()
    def add_grad_(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], *, step: int = 0, total: float = math.inf
    ) -> None:
        _add_weights_(weights, grads, 2.0 * value_at(self.strength, step, total))


class ElasticNet(Penalty):
    r"""The sum of :class:`L1` and :class:`L2`: :math:`l_1 \sum |w| + l_2 \sum w^2`.

    Args:
        l1: The strength of the sum of absolute values, >= 0.
        l2: The strength of the sum of squares, without a half, >= 0.
        on: The parameters that are penalized, as in :class:`L1`. Default: those with two dimensions or more.
        exclude: What is left out of them, in the same terms.

    Raises:
        ValueError: If a strength is not a number >= 0 or a schedule of such numbers.

    Example::

        >>> weight = torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, 3.0]])
        >>> ElasticNet(0.1, 0.2).value([weight])
        tensor(4.7000)
    """

    def __init__(
        self,
        l1: float | Schedule,
        l2: float | Schedule,
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        check_number("l1", l1, low=0.0, schedule=True)
        check_number("l2", l2, low=0.0, schedule=True)
        self.l1, self.l2, self.on, self.exclude = l1, l2, on, exclude

    def value(self, weights: Sequence[Tensor], *, step: int = 0, total: float = math.inf) -> Tensor:
        absolute = value_at(self.l1, step, total) * total_norm(weights, 1.0)
        return absolute + value_at(self.l2, step, total) * total_norm(weights, 2.0).square()

    @torch.no_grad()
    def add_grad_(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], *, step: int = 0, total: float = math.inf
    ) -> None:
        _add_signs_(weights, grads, value_at(self.l1, step, total))
        _add_weights_(weights, grads, 2.0 * value_at(self.l2, step, total))


def _add_signs_(weights: Sequence[Tensor], grads: Sequence[Tensor], factor: float) -> None:
    if factor and weights:
        # `_foreach_sign` on the whole list would allocate a second model, which costs more than the work itself.
        for some_weights, some_grads in foreach.chunks(shards.local_shards(weights), shards.local_shards(grads)):
            torch._foreach_add_(some_grads, _signs(some_weights), alpha=factor)


def _add_weights_(weights: Sequence[Tensor], grads: Sequence[Tensor], factor: float) -> None:
    if factor and weights:
        torch._foreach_add_(shards.local_shards(grads), shards.local_shards(weights), alpha=factor)


def _signs(weights: list[Tensor]) -> list[Tensor] | tuple[Tensor, ...]:
    if any(weight.is_complex() for weight in weights):
        return [torch.sgn(weight) for weight in weights]
    return torch._foreach_sign(weights)
