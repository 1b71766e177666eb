"""Measure groups of weights: the rows or columns of each tensor that stay or vanish together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from lightning_optim.base.norms import row_dims, row_sums
from lightning_optim.base.shards import sharded_dim


def group_norms(weights: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
    r"""Return the norms :math:`\lVert w_g \rVert_2` of the groups of each tensor, exact over shards.

    With ``dim=0`` a group holds the weights of one output of a layer, with ``dim=1`` those of one input. A vector or a
    scalar is one group. Each of stacked ensemble members has groups of its own.

    Args:
        weights: Parameters, plain or DTensors.
        dim: Dimension that numbers the groups, 0 or 1.

    Returns:
        The norms of each tensor, in fp32 or better, in a shape that broadcasts against its local part.

    Example::

        >>> group_norms([torch.tensor([[3.0, 4.0], [0.0, 0.0]])])
        [tensor([[5.],
                [0.]])]
    """
    return [squares.sqrt() for squares in row_sums(weights, squares=True, dim=dim)]


def placed_as_groups(norms: Tensor, weight: Tensor, dim: int = 0) -> Tensor:
    """Return one tensor's norms of :func:`group_norms` with the placement that they have, so that each counts once.

    Args:
        norms: The norms that this process holds, or what is computed from each by itself.
        weight: The tensor whose groups have these norms.
        dim: Dimension that numbers the groups, 0 or 1.
    """
    if not isinstance(weight, DTensor):
        return norms
    within = row_dims(weight, dim)
    kept = [Replicate() if sharded_dim(one) in within else one for one in weight.placements]
    shape = torch.Size(1 if own in within else size for own, size in enumerate(weight.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(norms, weight.device_mesh, kept, run_check=False, shape=shape, stride=stride)


def group_factor(weight: Tensor, dim: int = 0, scale_by_size: bool = False) -> float:
    r"""Return the factor of each norm of :func:`group_norms`: 1, or :math:`\sqrt{n_g}` for groups of n weights.

    Example::

        >>> weight = torch.zeros(4, 3, 3, 3)
        >>> group_factor(weight), group_factor(weight, dim=1, scale_by_size=True)
        (1.0, 6.0)
    """
    return math.sqrt(math.prod(weight.shape[own] for own in row_dims(weight, dim))) if scale_by_size else 1.0
