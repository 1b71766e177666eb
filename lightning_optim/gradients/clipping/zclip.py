"""Clipping of norms that stand out by their score."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_optim.base.arguments import check_number
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.base.selection import Selectors
from lightning_optim.base.state import per_unit
from lightning_optim.gradients.clipping.clipping_policy import Scope
from lightning_optim.gradients.clipping.norm_clipping_policy import NormClipping


class ZClip(NormClipping):
    r"""Clip norms that stand out by their score :math:`s = (n - \mu) / \sigma > z`, to :math:`\mu + \sigma z^2 / s`.

    From Kumar et al., *ZClip: Adaptive Spike Mitigation for LLM Pre-Training* (`arXiv:2504.02507
    <https://arxiv.org/abs/2504.02507>`_). :math:`\mu, \sigma` are those of the first ``warmup`` norms, in which nothing
    is clipped; then :math:`\mu \leftarrow d \mu + (1 - d) m` and :math:`\sigma^2 \leftarrow d \sigma^2 + (1 - d)(m -
    \mu)^2`, with :math:`m` the norm after clipping. Three things differ from the authors' code: a norm that is not
    finite never enters the statistics (one would end all clipping); the statistics are saved; and if the level has
    shifted, they are gathered anew after ``release_after`` clips in a row. Put :class:`ClipByNorm` behind it in a list
    for a bound that holds in the warm-up too.

    Args:
        z: The largest score that is not clipped, > 0.
        decay: d in [0, 1) of the running mean and variance.
        warmup: Steps with finite norms before the first clip, >= 1.
        release_after: Clips in a row after which the next step begins a new warm-up, >= 1. Ten are far more than a
            spike, and few in a run.
        norm_type: Exponent p > 0 of the norm; ``inf`` for the largest absolute value.
        scope: Parts with a norm and statistics of their own, as in :class:`ClipByNorm`.
        on: The parameters on whose gradients it acts. Default: all.
        exclude: The parameters that are left out.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> policy = ZClip(warmup=4)
        >>> for size in (1.0, 1.2, 0.8, 1.0, 50.0):
        ...     grad = torch.tensor([size])
        ...     norm = policy.clip_([grad])
        >>> grad
        tensor([1.0026])

    For a Trainer: ``Trainer(callbacks=[GradientClipping([ZClip(), ClipByNorm(10.0)])])``.
    """

    statistics: Tensor
    _used: tuple[Tensor, Tensor, Tensor] | None = None  # of the last step: whether it was warm, mean, deviation

    def __init__(
        self,
        z: float | Schedule = 2.5,
        decay: float = 0.97,
        warmup: int = 25,
        release_after: int = 10,
        norm_type: float = 2.0,
        scope: Scope = "global",
        on: Selectors = None,
        exclude: Selectors = None,
    ) -> None:
        self.z = check_number("z", z, low=0.0, low_open=True, schedule=True)
        self.decay = check_number("decay", decay, low=0.0, high=1.0, high_open=True)
        self.warmup = check_number("warmup", warmup, low=1, integer=True)
        self.release_after = check_number("release_after", release_after, low=1, integer=True)
        super().__init__(norm_type, scope, on, exclude)
        # Rows: number of norms seen, their mean, their variance, number of clips in a row.
        self.add_state("statistics", per_unit(rows=4))

    def _bound(self, norms: Tensor) -> Tensor:
        seen, mean, variance, run = torch.where(self.statistics[3] < self.release_after, self.statistics, 0.0)
        z_max = self.current(self.z)
        deviation = variance.sqrt() + 1e-6
        score = (norms - mean) / deviation
        warm, finite = seen >= self.warmup, norms.isfinite()
        self._used = warm, mean, deviation
        clips = warm & finite & (score > z_max)
        bound = torch.where(clips, mean + z_max**2 * deviation / score, torch.inf)

        entering = torch.where(clips, bound, norms)
        # In the warm-up: the exact mean and variance of all norms so far, updated with one norm at a time (Welford).
        weight = torch.where(warm, 1.0 - self.decay, 1.0 / (seen + 1.0))
        new_mean = mean + weight * (entering - mean)
        spread = torch.where(warm, (entering - new_mean).square(), (entering - mean) * (entering - new_mean))
        new_variance = variance + weight * (spread - variance)
        new = torch.stack([seen + 1.0, new_mean, new_variance, torch.where(clips, run + 1.0, 0.0)])
        self.statistics = torch.where(finite, new, torch.stack([seen, mean, variance, run]))
        return bound

    def bound_in_force(self, *, step: int = 0, total: float = math.inf) -> Tensor | None:
        # The largest norm that is not clipped; the bound of a clipped one depends on its score.
        if self._used is None or self.scope != "global":
            return None
        warm, mean, deviation = self._used
        return torch.where(warm, mean + value_at(self.z, step, total) * deviation, torch.inf)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_used": None}
