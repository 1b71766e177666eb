"""Clipping whose bound follows the training: the recent norms, their mean and deviation, the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.norms import row_sums
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.base.selection import Selector
from lightning_optim.gradients.clipping import Clipping, NormClipping, Scope
from lightning_optim.gradients.norm_history import Recent


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
        self._recent = Recent(history)

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


class AGC(Clipping):
    r"""Clip each row's gradient to a share of its weights: :math:`\|G_i\| \le \lambda \max(\|W_i\|, \epsilon)`.

    Adaptive gradient clipping (arXiv:2102.06171), which let networks train without batch normalization. A row is what
    one output of a layer is computed from: all dimensions but the first; a vector is one row. So the gradient is
    bounded by what the weights can bear, and not by a number that depends on the model. Leave the last layer out with
    ``exclude=``, as the authors do.

    Exact on shards: the sums of rows that are cut are taken over the ranks that hold the parts.

    Args:
        clipping: :math:`\lambda > 0`. Default 0.01, the paper's for batches of 4096; up to 0.08 for small batches.
        eps: The smallest norm of weights that counts, so that weights of zero can begin to grow.
        on: The parameters on whose gradients it acts: a glob over names, a module class, a predicate, or a list of
            these. Default: all.
        exclude: What is left out of them, in the same terms.

    Raises:
        ValueError: If an argument is out of its range, or ``clip_`` is called without ``weights``.

    Example::

        >>> weight, grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> AGC(0.01).clip_([grad], [weight])
        >>> grad
        tensor([[0.0000e+00, 5.0000e-02],
                [0.0000e+00, 1.0000e-05]])
    """

    _factors: list[Tensor] | None = None

    def __init__(
        self,
        clipping: float | Schedule = 0.01,
        eps: float = 1e-3,
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        check_number("clipping", clipping, low=0.0, low_open=True, schedule=True)
        check_number("eps", eps, low=0.0, low_open=True)
        self.clipping, self.eps, self.on, self.exclude = clipping, eps, on, exclude

    @torch.no_grad()
    def clip_(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor] = (),
        *,
        norm: Tensor | None = None,
        step: int = 0,
        total: float = math.inf,
    ) -> Tensor | None:
        if len(weights) != len(grads):
            raise ValueError(f"`weights` must be the parameters of {len(grads)} gradients, got {len(weights)}")
        if not grads:
            return norm
        # One call for both, so that rows that are cut need one reduction.
        sums = row_sums([*grads, *weights], like=[*weights, *weights], squares=True)
        torch._foreach_sqrt_(sums)
        norms, bounds = sums[: len(grads)], sums[len(grads) :]
        torch._foreach_clamp_min_(bounds, self.eps)
        torch._foreach_mul_(bounds, value_at(self.clipping, step, total))
        torch._foreach_clamp_min_(norms, 1e-6)
        torch._foreach_div_(bounds, norms)
        torch._foreach_clamp_max_(bounds, 1.0)
        torch._foreach_mul_(shards.local(grads), bounds)
        self._factors = None if any(isinstance(grad, DTensor) for grad in grads) else bounds
        return norm

    @property
    def clipped(self) -> Tensor | None:
        # Of rows that lie on other ranks nothing is known here.
        if self._factors is None:
            return None
        return torch.stack([(factor < 1.0).any() for factor in self._factors]).any()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_factors": None}
