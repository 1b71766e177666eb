"""The mean of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.averaging.average import Average


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
