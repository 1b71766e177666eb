"""The last values of something that is measured at each step, kept where they were computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


class Ring:
    """A ring of rows on their device. Nothing waits for the device, and nothing grows.

    Args:
        size: How many rows are kept, >= 1.

    Example::

        >>> recent = Ring(2)
        >>> for value in (1.0, 2.0, 3.0):
        ...     recent.append(torch.tensor([value]))
        >>> recent.rows
        tensor([[2.],
                [3.]])
        >>> recent.quantile(0.5)
        tensor([2.5000])
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._ring: Tensor | None = None

    def append(self, row: Tensor) -> None:
        """Add a vector; beyond ``size`` the oldest is forgotten. Of new columns the past is NaN."""
        if self._ring is None:
            self._ring = row.new_full((self.size, len(row)), torch.nan)
        elif self._ring.device != row.device:
            self._ring = self._ring.to(row.device)
        if len(row) > self._ring.shape[1]:
            self._ring = pad(self._ring, (0, len(row) - self._ring.shape[1]), value=torch.nan)
        self._ring[self.count % self.size].copy_(row)
        self.count += 1

    @property
    def rows(self) -> Tensor:
        """What is kept, the oldest first: shape ``[min(count, size), length of a row]``."""
        if self._ring is None:
            return torch.zeros(0, 0)
        if self.count <= self.size:
            return self._ring[: self.count]
        return self._ring.roll(-(self.count % self.size), 0)

    def quantile(self, q: float) -> Tensor:
        """For each column the quantile of its finite values, linear between two; NaN where there is none.

        ``torch.nanquantile``, which reads from the device in order to check its arguments.
        """
        assert self._ring is not None, "nothing was appended"
        values = self._ring[: min(self.count, self.size)]
        values = torch.where(values.isfinite(), values, torch.inf).sort(dim=0).values
        position = q * (values.isfinite().sum(0, keepdim=True) - 1).clamp_(min=0)
        below = position.floor()
        low, high = values.gather(0, below.long()), values.gather(0, position.ceil().long())
        found = torch.where(low == high, low, low + (position - below).to(low.dtype) * (high - low)).squeeze(0)
        return torch.where(found.isfinite(), found, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """The rows that are kept."""
        return {"rows": self.rows.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, also from a ring of another size."""
        self._ring, self.count = None, 0
        for row in state["rows"][-self.size :]:
            self.append(row)
