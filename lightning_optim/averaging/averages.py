"""Averages of weights over training steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_optim.averaging.average import Average as Average
from lightning_optim.base import shards
from lightning_optim.base.arguments import check_number


class EMA(Average):
    r"""The exponential moving average: :math:`e \leftarrow e + (1 - d^k)(w - e)`.

    The decay per step is :math:`d = \min(decay,\ 1 - (1 + t)^{-warmup})`, where :math:`t` counts the optimizer steps
    since the first update, and :math:`k` those since the previous one: an average that is updated every k steps forgets
    as fast as one that is updated at each. The first update copies the weights. Averaged weights generalize better, and
    resist noisy labels better, than the last ones (arXiv:2411.18704).

    Args:
        decay: The share that is kept per optimizer step, in [0, 1). The average looks back about
            :math:`1 / (1 - decay)` steps: 0.99 suits runs of some thousand steps, 0.999 of some ten thousand, 0.9999 of
            some hundred thousand.
        warmup: The power of the warm-up, positive, in which the average looks back over a part of the steps so far. The
            default 2/3 suits runs up to a million steps: it reaches a decay of 0.999 after 31.6 thousand steps and
            0.9999 after a million. 3/4 reaches them after 10 and 215 thousand. ``None`` has the full decay from the
            second update on, and the weights of the first update stay in it for long.
        half_life: In place of ``decay``: the optimizer steps after which a weight counts half,
            :math:`decay = 2^{-1 / half\_life}`.

    Raises:
        ValueError: If ``decay`` is not a number in [0, 1), ``half_life`` not one > 0, or not exactly one of them is
            given; or if ``warmup`` is not ``None`` or a number > 0.

    Example::

        >>> ema = EMA(0.9)
        >>> weight = torch.tensor([1.0])
        >>> for step in range(1, 4):
        ...     ema.update_([weight], step=step)
        ...     weight += 1.0
        >>> ema.averaged
        [tensor([2.2886])]
        >>> EMA(half_life=100, warmup=None).decay_at(1) ** 100
        0.5...
    """

    smooths_statistics = True

    def __init__(
        self, decay: float | None = None, warmup: float | None = 2 / 3, *, half_life: float | None = None
    ) -> None:
        if (decay is None) == (half_life is None):
            raise ValueError(f"give either `decay` or `half_life`, got decay={decay!r} and half_life={half_life!r}")
        if half_life is not None:
            check_number("half_life", half_life, low=0.0, low_open=True)
        else:
            check_number("decay", decay, low=0.0, high=1.0, high_open=True)
        if warmup is not None:
            check_number("warmup", warmup, low=0.0, low_open=True)
        super().__init__()
        self.decay, self.warmup, self.half_life = decay, warmup, half_life

    def decay_at(self, t: int) -> float:
        """The decay per step, t optimizer steps after the first update.

        Example::

            >>> round(EMA(0.999).decay_at(1), 4), EMA(0.999).decay_at(100_000)
            (0.37, 0.999)
        """
        decay = self.decay if self.half_life is None else 2.0 ** (-1.0 / self.half_life)
        assert decay is not None
        return decay if self.warmup is None else min(decay, 1.0 - (1.0 + t) ** -self.warmup)

    @torch.no_grad()
    def update_(self, weights: Sequence[Tensor], *, step: int) -> None:
        if not self.started:
            self._begin(weights, step)
        elif since := self._since(step):
            self._move_(weights, step, 1.0 - self.decay_at(step - self._counters["first"]) ** since)


class SWA(Average):
    r"""Stochastic weight averaging: the mean of all weights taken in, :math:`a \leftarrow a + (w - a) / (n + 1)`.

    Take in the weights rarely and late, at the end of each epoch of the last quarter of the run, with a learning rate
    that stays high (arXiv:1803.05407). Running statistics of BatchNorm belong to other weights then and are estimated
    anew: without that, accuracy breaks down.

    Example::

        >>> swa = SWA()
        >>> for step in (1, 2, 3):
        ...     swa.update_([torch.tensor([float(step)])], step=step)
        >>> swa.averaged
        [tensor([2.])]
    """

    @torch.no_grad()
    def update_(self, weights: Sequence[Tensor], *, step: int) -> None:
        if not self.started:
            self._begin(weights, step)
        elif self._since(step):
            self._move_(weights, step, 1.0 / (self._counters["updates"] + 1))


class LAWA(Average):
    r"""Latest weight averaging: the mean of the last ``size`` weights taken in, :math:`\frac1k \sum_i w_{n-i}`.

    With weights taken in at the end of each epoch it reaches the loss of a later epoch early in the run
    (arXiv:2209.14981). The last weights are all kept: memory is ``size + 1`` models.

    Args:
        size: How many, an integer >= 1. Default 6.

    Raises:
        ValueError: If ``size`` is not such an integer.

    Example::

        >>> lawa = LAWA(2)
        >>> for step in (1, 2, 3):
        ...     lawa.update_([torch.tensor([float(step)])], step=step)
        >>> lawa.averaged
        [tensor([2.5000])]
    """

    def __init__(self, size: int = 6) -> None:
        check_number("size", size, low=1, integer=True)
        super().__init__()
        self.size = size

    def reset(self) -> None:
        super().reset()
        self._latest: list[list[Tensor]] = []
        self._due = False  # whether the mean is older than the latest weights: it is computed when it is asked for

    @property
    def memory(self) -> list[list[Tensor]]:
        return self._latest

    @property
    def averaged(self) -> list[Tensor]:
        if self._due:
            self._mean_()
            self._due = False
        return self._averaged

    @torch.no_grad()
    def update_(self, weights: Sequence[Tensor], *, step: int) -> None:
        if not self.started:
            self._counters = {"updates": 0, "first": step, "last": step}
        elif not self._since(step):
            return
        while len(self._latest) > self.size:  # resumed with a smaller one
            self._latest.pop(0)
        if len(self._latest) < self.size:
            self._latest.append([self.copy_of(weight) for weight in weights])
        else:
            oldest = self._latest.pop(0)
            if oldest:
                torch._foreach_copy_(shards.local(oldest), shards.local(weights))
            self._latest.append(oldest)
        self._due = True
        self._counters = {**self._counters, "updates": self._counters["updates"] + 1, "last": step}

    @torch.no_grad()
    def _mean_(self) -> None:
        first, *others = (shards.local(weights) for weights in self._latest)
        if not self._averaged:
            self._averaged = [shards.placed_as(a.clone(), b) for a, b in zip(first, self._latest[0], strict=True)]
        mean = shards.local(self._averaged)
        if not mean:
            return
        torch._foreach_copy_(mean, first)
        for count, weights in enumerate(others, start=2):
            torch._foreach_lerp_(mean, weights, 1.0 / count)

    def load(
        self, counters: dict[str, int], averaged: Sequence[Tensor], memory: Sequence[Sequence[Tensor]] = ()
    ) -> None:
        super().load(counters, averaged)
        self._latest, self._due = [list(weights) for weights in memory], False

    def extend(self, weights: Sequence[Tensor]) -> None:
        for latest in self._latest:
            latest += [self.copy_of(weight) for weight in weights]
        if self._averaged:
            super().extend(weights)


class ByFunction(Average):
    """An average by a function of Lightning's kind.

    Args:
        function: ``(averaged, weight, number of updates before) -> averaged``, tensor by tensor.
    """

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    @torch.no_grad()
    def update_(self, weights: Sequence[Tensor], *, step: int) -> None:
        if not self.started:
            self._begin(weights, step)
        elif self._since(step):
            count = torch.tensor(self._counters["updates"])
            for mean, weight in zip(shards.local(self._averaged), shards.local(weights), strict=True):
                mean.copy_(self.function(mean, weight.to(mean), count))
            self._counters["updates"] += 1
            self._counters["last"] = step
