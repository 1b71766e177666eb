"""Penalize rows or columns of weights by their norms, so that whole groups become small together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.base.norms import total_norm
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors
from lightning_optim.regularization.groups import group_factor, group_norms, placed_as_groups
from lightning_optim.regularization.penalties.penalty import Penalty

_PIECE = 1 << 17  # elements; two pieces exist at a time


class GroupLasso(Penalty):
    r"""Penalize the sum of the norms of groups: :math:`s \sum_g \lVert w_g \rVert_2`.

    Its gradient is :math:`s w_g / \lVert w_g \rVert`, and zero for a group that is zero. A group is a row, all weights
    of one output of a layer, or a column, all weights of one input. A vector or a scalar is one group. Every group is
    drawn towards zero with the same force, however many weights it has: many groups become small as a whole, and a few
    stay large. By gradients alone a group comes near zero, and never stays there; :class:`ProximalGroupLasso` makes it
    exactly zero. (Yuan and Lin, *Model selection and estimation in regression with grouped variables*,
    `doi:10.1111/j.1467-9868.2005.00532.x <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_; Wen et al., *Learning
    Structured Sparsity in Deep Neural Networks*, `arXiv:1608.03665 <https://arxiv.org/abs/1608.03665>`_.)

    Args:
        strength: The factor :math:`s \ge 0`. The norm of a group of n weights is up to √n times smaller than the sum of
            their absolute values: begin with √n times the strength of an :class:`L1`.
        dim: Default 0: groups are the rows, one for each output of a linear layer or convolution. 1: they are the
            columns, one for each input.
        scale_by_size: Multiply each norm by the root of the number of weights in the group, so that layers of different
            width are penalized alike. Default False.
        on: The parameters that are penalized, as in :class:`L1`. Default: those with two dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If ``strength`` is not a number >= 0 or a schedule of such numbers, or another argument is not one
            of those above.

    Example::

        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> grad = torch.zeros(2, 2)
        >>> penalty = GroupLasso(0.1)
        >>> penalty.add_grad_([weight], [grad])
        >>> penalty.value([weight]), grad
        (tensor(0.5000), tensor([[0.0600, 0.0800],
                [0.0000, 0.0000]]))
        >>> callback = WeightRegularization(GroupLasso(1e-4))  # for Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        strength: float | Schedule,
        dim: Literal[0, 1] = 0,
        scale_by_size: bool = False,
        on: Selectors = None,
        exclude: Selectors = None,
    ) -> None:
        self.strength = check_number("strength", strength, low=0.0, schedule=True)
        self.dim: Literal[0, 1] = check_choice("dim", dim, Literal[0, 1])
        self.scale_by_size = check_choice("scale_by_size", scale_by_size, Literal[True, False])
        if self.dim == 1:  # columns are not whole among the looked-up rows of a sparse gradient; over shards they are
            self.needs, self.gathers = "matrices", True
        super().__init__(on, exclude)

    def _value(self, weights: Sequence[Tensor]) -> Tensor:
        norms = zip(group_norms(weights, self.dim), weights, strict=True)
        placed = [placed_as_groups(norm * self._factor_of(weight), weight, self.dim) for norm, weight in norms]
        return self.current(self.strength) * total_norm(placed, 1.0)

    def _add_grad_(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        if not (strength := self.current(self.strength)):
            return
        local = zip(shards.local_shards(weights), shards.local_shards(grads), strict=True)
        for weight, norms, (shard, grad) in zip(weights, group_norms(weights, self.dim), local, strict=True):
            norms = norms.masked_fill_(norms == 0.0, 1.0)  # the weights are zero too
            for some_grads, some_weights, some_norms in _pieces(grad, shard, norms):
                some_grads.addcdiv_(some_weights, some_norms, value=strength * self._factor_of(weight))

    def _factor_of(self, weight: Tensor) -> float:
        return group_factor(weight, self.dim, self.scale_by_size)


def _pieces(grad: Tensor, weight: Tensor, norms: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield live parts of a gradient, and those of weight and norms, in one dtype; small ones if this needs copies."""
    dtype = torch.promote_types(norms.dtype, weight.dtype)
    norms = norms.to(dtype)
    if weight.dtype == grad.dtype == dtype or not weight.ndim:
        yield grad, weight.to(dtype), norms
        return
    length = max(1, _PIECE * len(weight) // max(1, weight.numel()))
    for start in range(0, len(weight), length):
        some = slice(start, start + length)
        yield grad[some], weight[some].to(dtype), norms[some] if len(norms) == len(weight) else norms
