"""Measure groups of weights: the rows or columns of each tensor that stay or vanish together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lightning_optim.base.norms import row_dims, row_sums


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

        >>> import torch
        >>> group_norms([torch.tensor([[3.0, 4.0], [0.0, 0.0]])])
        [tensor([[5.],
                [0.]])]
    """
    return [squares.sqrt() for squares in row_sums(weights, squares=True, dim=dim)]


def group_sizes(weight: Tensor, dim: int = 0) -> int:
    """Return the number of weights in each group of a tensor, over all shards.

    Example::

        >>> import torch
        >>> group_sizes(torch.zeros(4, 3, 2, 2), dim=0), group_sizes(torch.zeros(4, 3, 2, 2), dim=1)
        (12, 16)
    """
    return math.prod(weight.shape[own] for own in row_dims(weight, dim))
