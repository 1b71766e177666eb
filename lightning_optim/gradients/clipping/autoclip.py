"""Clipping to a percentile of the last norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.base.arguments import check_number
from lightning_optim.base.ring import Ring
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.base.selection import Selector
from lightning_optim.gradients.clipping.clipping import Scope
from lightning_optim.gradients.clipping.norm_clipping import NormClipping


class AutoClip(NormClipping):
    r"""Clip by norm, to a percentile of the last norms, this one's included: :math:`c = \mathrm{perc}_p(n_{t-h+1..t})`.

    From arXiv:2007.14469, where p = 10 is called set-and-forget. It makes nine steps in ten shorter, so the length of a
    step hardly depends on the gradient any more: meant for Adam and its like. Norms that are not finite are not
    remembered; before there is one, nothing is clipped.

    Args:
        percentile: p in [0, 100], linear between two norms. Default 10, the paper's.
        history: How many steps are remembered. The paper remembers all; 1000 cost nothing, and follow the training.
        norm_type: The exponent p > 0 of the norm; ``inf`` for the largest absolute value.
        scope: What has a norm and a history of its own, as in :class:`ClipByNorm`. With ``"tensor"`` each step sorts
            ``history`` numbers for each tensor.
        on: The parameters on whose gradients it acts. Default: all.
        exclude: What is left out of them.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> policy = AutoClip(percentile=50.0)
        >>> for size in (1.0, 1.0, 8.0):
        ...     grad = torch.tensor([size])
        ...     norm = policy.clip_([grad])
        >>> grad
        tensor([1.0000])
    """

    def __init__(
        self,
        percentile: float | Schedule = 10.0,
        history: int = 1000,
        norm_type: float = 2.0,
        scope: Scope = "global",
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        check_number("percentile", percentile, low=0.0, high=100.0, schedule=True)
        check_number("history", history, low=1, integer=True)
        super().__init__(norm_type, scope, on, exclude)
        self.percentile, self.history = percentile, history
        self._recent = Ring(history)

    def bound(self, norms: Tensor, *, step: int = 0, total: float = math.inf) -> Tensor:
        self._recent.append(norms)
        bound = self._recent.quantile(value_at(self.percentile, step, total) / 100.0)
        return torch.where(bound.isnan(), torch.inf, bound)

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self._recent.state_dict()} if self._recent.count else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._recent.load_state_dict(state["recent"])
            self._count = self._recent.rows.shape[1]
