"""Penalize each weight by itself: its absolute value, its square, or both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.base import foreach, shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.norms import total_norm
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors
from lightning_optim.regularization.penalties.penalty import Penalty


class L1(Penalty):
    r"""Penalize the sum of absolute values: :math:`s \sum |w|`, with the gradient :math:`s \cdot \mathrm{sign}(w)`.

    It draws every weight towards zero with the same force. By gradients alone weights come near zero, and never stay
    there; :class:`ProximalL1` makes them exactly zero.

    Args:
        strength: The factor :math:`s \ge 0`; 1e-6 to 1e-4 is typical, since it multiplies a sum over all weights.
        on: The parameters that are penalized: a glob over names, a module class, a predicate, or a list of these.
            Default: those with two dimensions or more, since biases and the scales of normalization layers do not
            overfit. ``"*"`` takes all, as the textbook does. In YAML the key needs quotes, ``"on": "*"``, since a bare
            ``on`` is read as true there.
        exclude: The parameters that are left out, in the same terms.

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
        >>> callback = WeightRegularization(L1(1e-5))  # for Trainer(callbacks=[callback])
    """

    elementwise = True

    def __init__(self, strength: float | Schedule, on: Selectors = None, exclude: Selectors = None) -> None:
        self.strength = check_number("strength", strength, low=0.0, schedule=True)
        super().__init__(on, exclude)

    def _value(self, weights: Sequence[Tensor]) -> Tensor:
        return self.current(self.strength) * total_norm(weights, 1.0)

    def _add_grad_(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        _add_signs_(weights, grads, self.current(self.strength))


class L2(Penalty):
    r"""Penalize the sum of squares: :math:`s \sum w^2`, without a half, with the gradient :math:`2 s w`.

    ``torch.optim.SGD(weight_decay=d)`` is :math:`s = d / 2`. Under Adam a penalty is not weight decay, since its
    gradient is divided by the root of the second moment like any other (Loshchilov and
    Hutter, *Decoupled Weight Decay Regularization*, `arXiv:1711.05101 <https://arxiv.org/abs/1711.05101>`_).

    Args:
        strength: The factor :math:`s \ge 0`; 1e-5 to 1e-3 is typical.
        on: The parameters that are penalized: a glob over names, a module class, a predicate, or a list of these.
            Default: those with two dimensions or more, since biases and the scales of normalization layers do not
            overfit. ``"*"`` takes all, as the textbook does. In YAML the key needs quotes, ``"on": "*"``, since a bare
            ``on`` is read as true there.
        exclude: The parameters that are left out, in the same terms.

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
        >>> callback = WeightRegularization(L2(1e-4))  # for Trainer(callbacks=[callback])
    """

    elementwise = True

    def __init__(self, strength: float | Schedule, on: Selectors = None, exclude: Selectors = None) -> None:
        self.strength = check_number("strength", strength, low=0.0, schedule=True)
        self.decays = strength != 0.0
        super().__init__(on, exclude)

    def _value(self, weights: Sequence[Tensor]) -> Tensor:
        return self.current(self.strength) * total_norm(weights, 2.0).square()

    def _add_grad_(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        _add_weights_(weights, grads, 2.0 * self.current(self.strength))


class ElasticNet(Penalty):
    r"""Penalize with the sum of :class:`L1` and :class:`L2`: :math:`l_1 \sum |w| + l_2 \sum w^2`.

    Args:
        l1: The strength of the sum of absolute values, >= 0.
        l2: The strength of the sum of squares, without a half, >= 0.
        on: The parameters that are penalized, as in :class:`L1`. Default: those with two dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If a strength is not a number >= 0 or a schedule of such numbers.

    Example::

        >>> weight = torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, 3.0]])
        >>> ElasticNet(0.1, 0.2).value([weight])
        tensor(4.7000)
        >>> callback = WeightRegularization(ElasticNet(1e-5, 1e-4))  # for Trainer(callbacks=[callback])
    """

    elementwise = True

    def __init__(
        self, l1: float | Schedule, l2: float | Schedule, on: Selectors = None, exclude: Selectors = None
    ) -> None:
        self.l1 = check_number("l1", l1, low=0.0, schedule=True)
        self.l2 = check_number("l2", l2, low=0.0, schedule=True)
        self.decays = l2 != 0.0
        super().__init__(on, exclude)

    def _value(self, weights: Sequence[Tensor]) -> Tensor:
        absolute = self.current(self.l1) * total_norm(weights, 1.0)
        return absolute + self.current(self.l2) * total_norm(weights, 2.0).square()

    def _add_grad_(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        _add_signs_(weights, grads, self.current(self.l1))
        _add_weights_(weights, grads, 2.0 * self.current(self.l2))


def _add_signs_(weights: Sequence[Tensor], grads: Sequence[Tensor], factor: float) -> None:
    if factor:
        # `_foreach_sign` on the whole list would allocate a second model, which costs more than the work itself.
        for some_weights, some_grads in foreach.chunks(shards.local_shards(weights), shards.local_shards(grads)):
            torch._foreach_add_(some_grads, _signs(some_weights), alpha=factor)


def _add_weights_(weights: Sequence[Tensor], grads: Sequence[Tensor], factor: float) -> None:
    if factor:
        torch._foreach_add_(shards.local_shards(grads), shards.local_shards(weights), alpha=factor)


def _signs(weights: list[Tensor]) -> list[Tensor] | tuple[Tensor, ...]:
    if any(map(Tensor.is_complex, weights)):
        return [torch.sgn(weight) for weight in weights]
    return torch._foreach_sign(weights)
