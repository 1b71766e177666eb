"""Keep the last rows of numbers, such as norms, in a ring buffer on the device that computed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


class Ring:
    """Keep the last rows of numbers on their device, without waiting for it.

    Args:
        size: Number of rows that are kept, >= 1.

    Attributes:
        count: Number of rows that were added.

    Example::

        >>> ring = Ring(2)
        >>> for value in (1.0, 2.0, 3.0):
        ...     ring.append(torch.tensor([value]))
        >>> ring.rows
        tensor([[2.],
                [3.]])
        >>> ring.quantile(0.5)
        tensor([2.5000])
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._ring: Tensor | None = None

    def append(self, row: Tensor) -> None:
        """Add a vector in place of the oldest row. If it is longer than the rows so far, these are padded with NaN."""
        if self._ring is None:
            self._ring = row.new_full((self.size, len(row)), torch.nan)
        elif self._ring.device != row.device:
            self._ring = self._ring.to(row.device)
        if len(row) > self._ring.shape[1]:
            self._ring = pad(self._ring, (0, len(row) - self._ring.shape[1]), value=torch.nan)
        self._ring[self.count % self.size].copy_(row)
        self.count += 1

    @property
    def width(self) -> int:
        """Length of a row, as far as one was added."""
        return 0 if self._ring is None else self._ring.shape[1]

    @property
    def rows(self) -> Tensor:
        """The rows, the oldest first: shape ``[min(count, size), length of a row]``."""
        if self._ring is None:
            return torch.zeros(0, 0)
        if self.count <= self.size:
            return self._ring[: self.count]
        return self._ring.roll(-(self.count % self.size), 0)

    def quantile(self, q: float) -> Tensor:
        """Return the quantile of the finite values of each column, linear between two values; NaN without any.

        It equals ``torch.nanquantile``, which would wait for the device to check its arguments.
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
        """Return the rows."""
        return {"rows": self.rows.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, also from a ring of another size."""
        self._ring, self.count = None, 0
        for row in state["rows"][-self.size :]:
            self.append(row)
