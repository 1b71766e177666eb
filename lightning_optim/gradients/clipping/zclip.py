"""Clipping of norms that stand out by their score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_optim.base.arguments import check_number
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.base.selection import Selector
from lightning_optim.gradients.clipping.clipping import Scope
from lightning_optim.gradients.clipping.norm_clipping import NormClipping


class ZClip(NormClipping):
    r"""Clip norms that stand out by their score :math:`s = (n - \mu) / \sigma > z`, to :math:`\mu + \sigma z^2 / s`.

    From arXiv:2504.02507. :math:`\mu, \sigma` are those of the first ``warmup`` norms, in which nothing is clipped;
    then :math:`\mu \leftarrow d \mu + (1 - d) m` and :math:`\sigma^2 \leftarrow d \sigma^2 + (1 - d)(m - \mu)^2`, with
    :math:`m` the norm after clipping. What the authors' code lacks is here: a norm that is not finite never enters the
    statistics (one would end all clipping), they are saved, and a level that has shifted is released: after
    ``release_after`` clips in a row they are gathered anew. Put :class:`ClipByNorm` behind it in a list for a bound
    that holds in the warm-up too.

    Args:
        z: The largest score that is not clipped, > 0.
        decay: d in [0, 1) of the running mean and variance.
        warmup: Steps with finite norms before the first clip, >= 1.
        release_after: Clips in a row after which the next step begins a new warm-up, >= 1. Ten are far more than a
            spike, and few in a run.
        norm_type: The exponent p > 0 of the norm; ``inf`` for the largest absolute value.
        scope: What has a norm and statistics of its own, as in :class:`ClipByNorm`.
        on: The parameters on whose gradients it acts. Default: all.
        exclude: What is left out of them.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> policy = ZClip(warmup=4)
        >>> for size in (1.0, 1.2, 0.8, 1.0, 50.0):
        ...     grad = torch.tensor([size])
        ...     norm = policy.clip_([grad])
        >>> grad
        tensor([1.0026])
    """

    def __init__(
        self,
        z: float | Schedule = 2.5,
        decay: float = 0.97,
        warmup: int = 25,
        release_after: int = 10,
        norm_type: float = 2.0,
        scope: Scope = "global",
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        check_number("z", z, low=0.0, low_open=True, schedule=True)
        check_number("decay", decay, low=0.0, high=1.0, high_open=True)
        check_number("warmup", warmup, low=1, integer=True)
        check_number("release_after", release_after, low=1, integer=True)
        super().__init__(norm_type, scope, on, exclude)
        self.z, self.decay, self.warmup, self.release_after = z, decay, warmup, release_after
        # Norms seen, their mean, their variance, clips in a row: one column for each unit of the scope.
        self._statistics: Tensor | None = None

    def bound(self, norms: Tensor, *, step: int = 0, total: float = math.inf) -> Tensor:
        if self._statistics is None:
            self._statistics = norms.new_zeros(4, len(norms))
        before = pad(self._statistics.to(norms.device), (0, len(norms) - self._statistics.shape[1]))
        seen, mean, variance, run = torch.where(before[3] < self.release_after, before, 0.0)
        z_max = value_at(self.z, step, total)
        deviation = variance.sqrt() + 1e-6
        score = (norms - mean) / deviation
        warm, finite = seen >= self.warmup, norms.isfinite()
        clips = warm & finite & (score > z_max)
        bound = torch.where(clips, mean + z_max**2 * deviation / score, torch.inf)

        entering = torch.where(clips, bound, norms)
        # In the warm-up the exact mean and variance of what was seen, one norm at a time (Welford).
        weight = torch.where(warm, 1.0 - self.decay, 1.0 / (seen + 1.0))
        new_mean = mean + weight * (entering - mean)
        spread = torch.where(warm, (entering - new_mean).square(), (entering - mean) * (entering - new_mean))
        new_variance = variance + weight * (spread - variance)
        new = torch.stack([seen + 1.0, new_mean, new_variance, torch.where(clips, run + 1.0, 0.0)])
        self._statistics = torch.where(finite, new, torch.stack([seen, mean, variance, run]))
        return bound

    def state_dict(self) -> dict[str, Any]:
        return {} if self._statistics is None else {"statistics": self._statistics.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._statistics = state.get("statistics")
        self._count = 0 if self._statistics is None else self._statistics.shape[1]
