"""Penalize the distance of each weight matrix from one with orthonormal rows or columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.module_tensors import dimensions
from lightning_optim.base.norms import total_norm
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors
from lightning_optim.regularization.penalties.penalty import Penalty, in_full


class Orthogonal(Penalty):
    r"""Penalize matrices whose rows are not orthonormal: :math:`s \lVert W W^\top - I \rVert_F^2`.

    Its gradient is :math:`4 s (W W^\top - I) W`. If W has more rows than columns, it is the same with the columns:
    :math:`s \lVert W^\top W - I \rVert_F^2`. The weight of a convolution is a matrix with a row for each output
    channel. Orthonormal rows keep the norms of signals and gradients from layer to layer. It is soft orthogonality
    (Bansal, Chen and Wang, *Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?*,
    `arXiv:1810.09102 <https://arxiv.org/abs/1810.09102>`_).

    Sharded weights are gathered, one at a time. A vector is one row, and is drawn to the norm 1.

    Args:
        strength: The factor :math:`s \ge 0`. Begin with 1e-4 and change it by factors of ten. A schedule that ends at 0
            leaves the last epochs to the task.
        on: The parameters that are penalized, as in :class:`L1`. Default: those with two dimensions or more, also
            embeddings, whose columns are then drawn to be orthonormal: leave them out with ``exclude=nn.Embedding``.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If ``strength`` is not a number >= 0 or a schedule of such numbers.

    Example::

        >>> weight = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> grad = torch.zeros(2, 3)
        >>> penalty = Orthogonal(0.1)
        >>> penalty.add_grad_([weight], [grad])
        >>> penalty.value([weight]), grad
        (tensor(0.9000), tensor([[2.4000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000]]))
        >>> callback = WeightRegularization(Orthogonal(1e-4))  # for Trainer(callbacks=[callback])
    """

    needs = "matrices"
    gathers = True

    def __init__(self, strength: float | Schedule, on: Selectors = None, exclude: Selectors = None) -> None:
        self.strength = check_number("strength", strength, low=0.0, schedule=True)
        super().__init__(on, exclude)

    def _value(self, weights: Sequence[Tensor]) -> Tensor:
        return self.current(self.strength) * total_norm([_errors(_matrix(one)) for one in weights], 2.0).square()

    def _add_grad_(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        if not (strength := self.current(self.strength)):
            return
        for weight, grad in zip(weights, shards.local_shards(grads), strict=True):
            matrix = _matrix(weight)
            errors = _errors(matrix)
            slope = errors @ matrix if _is_wide(matrix) else matrix @ errors
            grad.add_(shards.shard_of(slope.reshape(weight.shape), weight), alpha=4.0 * strength)


def _matrix(weight: Tensor) -> Tensor:
    """Return the whole weight as a matrix, or as a stack of them if it has members, in fp32 or better."""
    whole = in_full(weight)
    own = dimensions(weight)
    return (
        whole.flatten(weight.ndim - own + 1) if own >= 2 else whole.reshape(*weight.shape[: weight.ndim - own], 1, -1)
    )


def _errors(matrix: Tensor) -> Tensor:
    """Return the products of all pairs of rows, or of columns if these are fewer, minus the identity."""
    products = matrix @ matrix.mH if _is_wide(matrix) else matrix.mH @ matrix
    identity = torch.eye(products.shape[-1], dtype=products.dtype, device=products.device)
    return products - identity


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[-2] <= matrix.shape[-1]
