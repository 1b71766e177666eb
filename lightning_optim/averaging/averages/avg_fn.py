"""Average weights with Lightning's ``avg_fn``, for the drop-in callback alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_optim.averaging.averages.average import Average
from lightning_optim.base import shards
from lightning_optim.base.dtypes import without_autocast


class AvgFnAverage(Average):
    """Average weights with the function that a user gave to Lightning's callback.

    Args:
        function: ``(averaged, weight, number of updates so far) -> averaged``, called for each tensor.
    """

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    @property
    def identity(self) -> str:
        """Name in checkpoints: the name that the class had when the first of them were written."""
        return "ByFunction()"

    @torch.no_grad()
    @without_autocast
    def update_(self, weights: Sequence[Tensor], *, step: int) -> None:
        if not self.started:
            self._begin(weights, step)
        elif self._since(step):
            count = torch.tensor(self._counters["updates"])
            for mean, weight in zip(shards.local_shards(self._averaged), shards.local_shards(weights), strict=True):
                mean.copy_(self.function(mean, weight.to(mean), count))
            self._counters["updates"] += 1
            self._counters["last"] = step
