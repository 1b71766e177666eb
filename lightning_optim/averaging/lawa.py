"""The mean of the latest weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.averaging.average import Average
from lightning_optim.base import shards
from lightning_optim.base.arguments import check_number


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
                torch._foreach_copy_(shards.local_shards(oldest), shards.local_shards(weights))
            self._latest.append(oldest)
        self._due = True
        self._counters = {**self._counters, "updates": self._counters["updates"] + 1, "last": step}

    @torch.no_grad()
    def _mean_(self) -> None:
        first, *others = (shards.local_shards(weights) for weights in self._latest)
        if not self._averaged:
            self._averaged = [shards.placed_as(a.clone(), b) for a, b in zip(first, self._latest[0], strict=True)]
        mean = shards.local_shards(self._averaged)
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
