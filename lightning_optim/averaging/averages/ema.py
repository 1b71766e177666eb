"""Average weights exponentially."""

from __future__ import annotations

from lightning_optim.averaging.averages.average import Average
from lightning_optim.base.arguments import check_number


class EMA(Average):
    r"""Average the weights exponentially: :math:`e \leftarrow e + (1 - d^k)(w - e)`.

    The decay per step is :math:`d = \min(decay,\ 1 - (1 + t)^{-warmup})`, where :math:`t` counts the optimizer steps
    since the first update, and :math:`k` those since the previous one: an average that is updated every k steps forgets
    as fast as one that is updated at each. The first update copies the weights. Averaged weights generalize better, and
    resist noisy labels better, than the last ones (Morales-Brotons et al., *Exponential Moving Average of Weights in
    Deep Learning: Dynamics and Benefits*, `arXiv:2411.18704 <https://arxiv.org/abs/2411.18704>`_).

    Args:
        decay: The share that is kept per optimizer step, in [0, 1). The average looks back about
            :math:`1 / (1 - decay)` steps, which should be about a hundredth of the run: 0.9 suits a thousand steps,
            0.99 ten thousand, 0.999 a hundred thousand.
        warmup: The power of the warm-up, positive, in which the average looks back over a part of the steps so far. The
            default 2/3 suits runs up to a million steps: it reaches a decay of 0.99 after a thousand steps, 0.999 after
            31.6 thousand and 0.9999 after a million. 3/4 reaches the last two after 10 and 215 thousand. ``None`` has
            the full decay from the second update on, and the weights of the first update stay in it for long.
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
        >>> callback = WeightAveraging(EMA(0.999))  # for Trainer(callbacks=[callback])
    """

    smooths_statistics = True

    def __init__(
        self, decay: float | None = None, warmup: float | None = 2 / 3, *, half_life: float | None = None
    ) -> None:
        if (decay is None) == (half_life is None):
            raise ValueError(f"Pass either `decay` or `half_life`, got decay={decay!r} and half_life={half_life!r}")
        if half_life is not None:
            check_number("half_life", half_life, low=0.0, low_open=True)
        else:
            check_number("decay", decay, low=0.0, high=1.0, high_open=True)
        if warmup is not None:
            check_number("warmup", warmup, low=0.0, low_open=True)
        super().__init__()
        self.decay, self.warmup, self.half_life = decay, warmup, half_life

    def decay_at(self, t: int) -> float:
        """Return the decay per step, t optimizer steps after the first update.

        Example::

            >>> round(EMA(0.999).decay_at(1), 4), EMA(0.999).decay_at(100_000)
            (0.37, 0.999)
        """
        return self._decay if self.warmup is None else min(self._decay, 1.0 - (1.0 + t) ** -self.warmup)

    @property
    def _decay(self) -> float:
        """The decay per step after the warm-up."""
        if self.half_life is not None:
            return 2.0 ** (-1.0 / self.half_life)
        assert self.decay is not None
        return self.decay

    def unreached(self, steps: int) -> str:
        reached = self.decay_at(steps - 1)
        if self.warmup is None or reached >= self._decay:
            return ""
        argument = "decay" if self.half_life is None else "half_life"
        return (
            f"The warm-up of {self!r} ends at a decay of {reached:.4g} after the {steps:,} steps of this run, so every"
            f" larger `{argument}` gives the same average. Pass a smaller one, which averages over fewer steps, or"
            " `warmup=None`, which has the whole decay from the second update on."
        )

    def _share(self, step: int) -> float:
        return 1.0 - self.decay_at(step - self._counters["first"]) ** (step - self._counters["last"])
