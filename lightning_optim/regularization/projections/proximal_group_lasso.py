"""Shorten rows or columns of weights after the optimizer step, and set short ones to exactly zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors
from lightning_optim.regularization.groups import group_factor, group_norms
from lightning_optim.regularization.projections.proximal import Proximal


class ProximalGroupLasso(Proximal):
    r"""Shrink each row of a weight: :math:`w_g \leftarrow w_g \max(1 - \eta s / \lVert w_g \rVert, 0)`.

    :math:`\eta` is the learning rate. A row shorter than :math:`\eta s` becomes exactly zero as a whole, so that an
    output of the layer, or with ``dim=1`` an input, has no effect and can be removed. Under plain SGD it minimizes the
    sum that the group lasso penalizes (Yuan and Lin, *Model Selection and Estimation in Regression with Grouped
    Variables*, `doi:10.1111/j.1467-9868.2005.00532.x <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_). Under Adam
    the threshold is not divided by the root of the second moment, so it is not the proximal step of Adam's metric. A
    learning rate that decays to zero takes the threshold with it.

    Exact on shards: the sums of rows that are cut are taken over the ranks that hold the parts.

    Args:
        strength: The factor :math:`s \ge 0`.
        dim: Dimension that numbers the groups. Default 0: a group holds all weights of one output of a layer. 1: all
            weights of one input, also of a convolution. A vector is one group.
        scale_by_size: Multiply the threshold of each group by :math:`\sqrt{n_g}`, the root of its number of weights, as
            Yuan and Lin do, so that one strength serves layers of different widths. Default False.
        on: The parameters that are projected: a glob over names, a module class, a predicate, or a list of these.
            Default: those with two dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If ``strength`` is not a number >= 0 or a schedule of such numbers, ``dim`` is not 0 or 1, or
            ``scale_by_size`` is not a ``bool``.

    Example::

        >>> weight = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> ProximalGroupLasso(10.0).project_([weight], lr=0.1)
        >>> weight
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
        >>> callback = WeightRegularization(ProximalGroupLasso(0.1))  # for Trainer(callbacks=[callback])
    """

    makes_zeros = True

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
        super().__init__(on, exclude)

    def _project_(self, weights: Sequence[Tensor], lr: float) -> None:
        threshold = lr * self.current(self.strength)
        if not threshold:
            return  # a group of zeros would become 0 * 0 / 0
        thresholds = [-threshold * group_factor(weight, self.dim, self.scale_by_size) for weight in weights]
        factors = group_norms(weights, self.dim)
        torch._foreach_reciprocal_(factors)
        torch._foreach_mul_(factors, thresholds)
        torch._foreach_add_(factors, 1.0)
        torch._foreach_clamp_min_(factors, 0.0)
        torch._foreach_mul_(shards.local_shards(weights), factors)
