"""Bound or fix the norms of rows or columns of weights after the optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors
from lightning_optim.regularization.groups import group_norms
from lightning_optim.regularization.projections.proximal import Proximal


class MaxNorm(Proximal):
    r"""Scale down each row of a weight that is too long: :math:`w_g \leftarrow w_g \min(1, c / \lVert w_g \rVert)`.

    The max-norm constraint (Srivastava et al., *Dropout: A Simple Way to Prevent Neural Networks from Overfitting*,
    `JMLR 15, 2014 <https://jmlr.org/papers/v15/srivastava14a.html>`_). Shorter rows stay as they are, so that it does
    nothing until training drives weights far out. It allows large learning rates, and is mostly used beside dropout.
    The learning rate does not enter.

    Exact on shards: the sums of rows that are cut are taken over the ranks that hold the parts.

    Args:
        max_norm: The largest norm :math:`c > 0`.
        dim: Dimension that numbers the groups. Default 0: a group holds all weights of one output of a layer, the
            incoming weights of a unit, as in the paper. 1: all weights of one input, also of a convolution. A vector is
            one group.
        on: The parameters that are projected: a glob over names, a module class, a predicate, or a list of these.
            Default: those with two dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If ``max_norm`` is not a number > 0 or a schedule of such numbers, or ``dim`` is not 0 or 1.

    Example::

        >>> weight = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> MaxNorm(2.0).project_([weight], lr=0.1)
        >>> weight
        tensor([[1.2000, 1.6000],
                [0.3000, 0.4000]])
        >>> callback = WeightRegularization(MaxNorm(3.0))  # for Trainer(callbacks=[callback])
    """

    def __init__(
        self, max_norm: float | Schedule, dim: Literal[0, 1] = 0, on: Selectors = None, exclude: Selectors = None
    ) -> None:
        self.max_norm = check_number("max_norm", max_norm, low=0.0, low_open=True, schedule=True)
        self.dim: Literal[0, 1] = check_choice("dim", dim, Literal[0, 1])
        super().__init__(on, exclude)

    def _project_(self, weights: Sequence[Tensor], lr: float) -> None:
        factors = group_norms(weights, self.dim)
        torch._foreach_reciprocal_(factors)
        torch._foreach_mul_(factors, self.current(self.max_norm))
        torch._foreach_clamp_max_(factors, 1.0)
        torch._foreach_mul_(shards.local_shards(weights), factors)


class UnitNorm(Proximal):
    r"""Scale each row of a weight to length one: :math:`w_g \leftarrow w_g / \lVert w_g \rVert`.

    So a layer learns directions alone, as class vectors that are compared by their cosine. A row of zeros stays zero.
    The learning rate does not enter.

    Exact on shards: the sums of rows that are cut are taken over the ranks that hold the parts.

    Args:
        dim: Dimension that numbers the groups. Default 0: a group holds all weights of one output of a layer. 1: all
            weights of one input, also of a convolution. A vector is one group.
        on: The parameters that are projected: a glob over names, a module class, a predicate, or a list of these.
            Default: those with two dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If ``dim`` is not 0 or 1.

    Example::

        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> UnitNorm().project_([weight], lr=0.1)
        >>> weight
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
        >>> callback = WeightRegularization(UnitNorm(on="head.weight"))  # for Trainer(callbacks=[callback])
    """

    def __init__(self, dim: Literal[0, 1] = 0, on: Selectors = None, exclude: Selectors = None) -> None:
        self.dim: Literal[0, 1] = check_choice("dim", dim, Literal[0, 1])
        super().__init__(on, exclude)

    def _project_(self, weights: Sequence[Tensor], lr: float) -> None:
        factors = group_norms(weights, self.dim)
        torch._foreach_clamp_min_(factors, torch.finfo(torch.float32).tiny)  # or zeros would be 0 * inf
        torch._foreach_reciprocal_(factors)
        torch._foreach_mul_(shards.local_shards(weights), factors)
