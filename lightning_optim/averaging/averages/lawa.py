"""Average the latest weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.averaging.averages.average import Average
from lightning_optim.base import shards
from lightning_optim.base.arguments import check_number


class LAWA(Average):
    r"""Average the last ``size`` weights with equal shares (latest weight averaging): :math:`\frac1k \sum_i w_{n-i}`.

    With weights taken in at the end of each epoch it reaches the loss of a later epoch early in the run (Kaddour, *Stop
    Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging*, `arXiv:2209.14981
    <https://arxiv.org/abs/2209.14981>`_). The last weights are all kept: memory is ``size + 1`` models.

    Args:
        size: Number of weights, an integer >= 1. Default 6.

    Raises:
        ValueError: If ``size`` is not such an integer.

    Example::

        >>> lawa = LAWA(2)
        >>> for step in (1, 2, 3):
        ...     lawa.update_([torch.tensor([float(step)])], step=step)
        >>> lawa.averaged
        [tensor([2.5000])]
        >>> callback = WeightAveraging(LAWA(6), every="epoch")  # for Trainer(callbacks=[callback])
    """

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.size = check_number("size", size, low=1, integer=True)

    @torch.no_grad()
    def update_(self, weights: Sequence[Tensor], *, step: int) -> None:
        if not self.started:
            self._counters = {"updates": 0, "first": step, "last": step}
        elif not self._since(step):
            return
        self._remember_(weights, self.size)
        self._counters["updates"] += 1
        self._counters["last"] = step

    @torch.no_grad()
    def _compute_(self) -> None:
        first, *others = (shards.local_shards(weights) for weights in self._memory)
        if not self._averaged:
            self._averaged = [shards.placed_as(a.clone(), b) for a, b in zip(first, self._memory[0], strict=True)]
        mean = shards.local_shards(self._averaged)
        if not mean:
            return
        torch._foreach_copy_(mean, first)
        for count, weights in enumerate(others, start=2):
            torch._foreach_lerp_(mean, weights, 1.0 / count)
