"""Draw the masks of dropout."""

from __future__ import annotations

import torch
from torch import Tensor


def mask(like: Tensor, rate: float) -> Tensor:
    """Return a Bernoulli mask of 0 and :math:`1 / (1 - rate)`, like ``like`` in shape, dtype and device; its mean is 1.

    Example::

        >>> round(mask(torch.empty(100_000), 0.2).mean().item(), 1)
        1.0
    """
    if rate >= 1.0:
        return torch.zeros_like(like)
    return torch.empty_like(like).bernoulli_(1.0 - rate).div_(1.0 - rate)
