"""The order in which callbacks of ours act, whatever the order of the user's list."""

from __future__ import annotations

import enum


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
