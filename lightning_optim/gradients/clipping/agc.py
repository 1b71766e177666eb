"""Clipping of each row to a share of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.norms import row_sums
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors
from lightning_optim.gradients.clipping.clipping_policy import Clipping


class AGC(Clipping):
    r"""Clip each row of the gradient to a share of its weights: :math:`\|G_i\| \le \lambda \max(\|W_i\|, \epsilon)`.

    Adaptive gradient clipping (Brock et al., *High-Performance Large-Scale Image Recognition Without Normalization*,
    `arXiv:2102.06171 <https://arxiv.org/abs/2102.06171>`_), which let networks train without batch normalization. A row
    holds the weights of one output of a layer: all dimensions but the first; a vector is one row. So the bound is
    relative to the weights, and no absolute number that depends on the model. Leave the last layer out with
    ``exclude=``, as the authors do.

    Exact on shards: the sums of rows that are cut are taken over the ranks that hold the parts.

    Args:
        clipping: :math:`\lambda > 0`. Default 0.01, the paper's for batches of 4096; up to 0.08 for small batches.
        eps: The smallest norm of weights that counts, so that weights of zero can begin to grow.
        on: The parameters on whose gradients it acts: a glob over names, a module class, a predicate, or a list of
            these. Default: all.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If an argument is out of its range, or ``clip_`` is called without ``weights``.

    Example::

        >>> weight, grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> AGC(0.01).clip_([grad], [weight])
        >>> grad
        tensor([[0.0000e+00, 5.0000e-02],
                [0.0000e+00, 1.0000e-05]])

    For a Trainer: ``Trainer(callbacks=[GradientClipping(AGC(0.01, exclude="head.*"))])``.
    """

    _factors: list[Tensor] | None = None

    def __init__(
        self,
        clipping: float | Schedule = 0.01,
        eps: float = 1e-3,
        on: Selectors = None,
        exclude: Selectors = None,
    ) -> None:
        self.clipping = check_number("clipping", clipping, low=0.0, low_open=True, schedule=True)
        self.eps = check_number("eps", eps, low=0.0, low_open=True)
        super().__init__(on, exclude)

    def _clip_(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        if len(weights) != len(grads):
            raise ValueError(f"`weights` must be the parameters of {len(grads)} gradients, got {len(weights)}")
        # One call for both, so that rows that are cut need one reduction.
        sums = row_sums([*grads, *weights], like=[*weights, *weights], squares=True)
        torch._foreach_sqrt_(sums)
        norms, bounds = sums[: len(grads)], sums[len(grads) :]
        torch._foreach_clamp_min_(bounds, self.eps)
        torch._foreach_mul_(bounds, self.current(self.clipping))
        torch._foreach_clamp_min_(norms, 1e-6)
        torch._foreach_div_(bounds, norms)
        torch._foreach_clamp_max_(bounds, 1.0)
        torch._foreach_mul_(shards.local_shards(grads), bounds)
        self._factors = None if any(isinstance(grad, DTensor) for grad in grads) else bounds

    @property
    def clipped(self) -> Tensor | None:
        # Unknown for shards: the factors of rows on other ranks are not here.
        if self._factors is None:
            return None
        return torch.stack([(factor < 1.0).any() for factor in self._factors]).any()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_factors": None}
