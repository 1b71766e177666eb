"""Clipping to a percentile of the last norms."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.base.arguments import check_number
from lightning_optim.base.ring_buffer import Ring
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors
from lightning_optim.base.state import ring
from lightning_optim.gradients.clipping.clipping_policy import Scope
from lightning_optim.gradients.clipping.norm_clipping_policy import NormClipping


class AutoClip(NormClipping):
    r"""Clip by norm, to a percentile of the last norms, this one's included: :math:`c = \mathrm{perc}_p(n_{t-h+1..t})`.

    From Seetharaman et al., *AutoClip: Adaptive Gradient Clipping for Source Separation Networks*
    (`arXiv:2007.14469 <https://arxiv.org/abs/2007.14469>`_), where p = 10 is called set-and-forget. It makes nine steps
    in ten shorter, so the length of a step hardly depends on the gradient any more: meant for Adam and its like. Norms
    that are not finite are not remembered; before there is one, nothing is clipped.

    Args:
        percentile: p in [0, 100], linear between two norms. Default 10, the paper's.
        history: Number of steps that are remembered. The paper remembers all; 1000 cost nothing, and follow the
            training.
        norm_type: Exponent p > 0 of the norm; ``inf`` for the largest absolute value.
        scope: Parts with a norm and a history of their own, as in :class:`ClipByNorm`. With ``"tensor"`` each step
            sorts ``history`` numbers for each tensor.
        on: The parameters on whose gradients it acts. Default: all.
        exclude: The parameters that are left out.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> policy = AutoClip(percentile=50.0)
        >>> for size in (1.0, 1.0, 8.0):
        ...     grad = torch.tensor([size])
        ...     norm = policy.clip_([grad])
        >>> grad
        tensor([1.0000])

    For a Trainer: ``Trainer(callbacks=[GradientClipping(AutoClip())])``.
    """

    recent: Ring

    def __init__(
        self,
        percentile: float | Schedule = 10.0,
        history: int = 1000,
        norm_type: float = 2.0,
        scope: Scope = "global",
        on: Selectors = None,
        exclude: Selectors = None,
    ) -> None:
        self.percentile = check_number("percentile", percentile, low=0.0, high=100.0, schedule=True)
        self.history = check_number("history", history, low=1, integer=True)
        super().__init__(norm_type, scope, on, exclude)
        self.add_state("recent", ring(history))

    def _bound(self, norms: Tensor) -> Tensor:
        self.recent.append(norms)
        bound = self.recent.quantile(self.current(self.percentile) / 100.0)
        return torch.where(bound.isnan(), torch.inf, bound)
