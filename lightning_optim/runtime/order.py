"""The order in which callbacks of ours act, whatever the order of the user's list."""

from __future__ import annotations

import enum
from typing import Protocol

from torch import Tensor


class Slot(enum.IntEnum):
    """When a callback acts within one step.

    The step itself, and projections after it, come between CLIP and AVERAGE.
    """

    ACCUMULATE = 0
    PENALIZE = 1
    MEASURE = 2
    CLIP = 3
    AVERAGE = 4
    STOP = 5


class EvaluatedAverage(Protocol):
    """Who holds the weights that a validation uses in place of the raw ones."""

    def averaged_state(self) -> dict[str, Tensor]:
        """Name in the model's ``state_dict`` to averaged tensor; empty as long as raw weights are evaluated."""
