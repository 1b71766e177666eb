"""Count the steps that were clipped, without a kernel or a wait in a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HELD = 256  # Number of steps whose factors are held until they are counted together.


class ClippedSteps:
    """Count of the steps of one optimizer in which clipping made gradients smaller.

    Args:
        clipped: Number of clipped steps.
        seen: Number of steps of which it is known whether they were clipped.

    Example::

        >>> steps = ClippedSteps()
        >>> for factors in ([], [torch.tensor([1.0])], [torch.tensor([1.0]), torch.tensor([1.0, 0.5])]):
        ...     steps.add(factors)
        >>> steps.state()
        (1, 3)
    """

    def __init__(self, clipped: int = 0, seen: int = 0) -> None:
        self._clipped: Tensor | int = clipped
        self._seen = seen
        self._held: list[Sequence[Tensor]] = []

    def add(self, factors: Sequence[Tensor]) -> None:
        """Note the factors of a step, one vector for each policy that acted: below 1 where it was clipped."""
        self._seen += 1
        if factors:
            self._held.append(factors)
        if len(self._held) >= _HELD:
            self._count()

    def _count(self) -> None:
        if self._held:
            smallest = torch.stack([torch.cat(list(factors)).min() for factors in self._held])
            self._clipped, self._held = self._clipped + (smallest < 1.0).sum(), []

    def state(self) -> tuple[int, int]:
        """Return the number of clipped steps, and of how many: waits for the device."""
        self._count()
        return int(self._clipped), self._seen
