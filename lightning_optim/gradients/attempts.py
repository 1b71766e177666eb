"""Which steps were tried and did not happen."""

from __future__ import annotations

from collections import Counter


class Attempts:
    """Counts, by optimizer, steps that had gradients and moved nothing: skipped by a scaler, or dropped by somebody.

    No hook says that a scaler skipped a step, and to ask the scaler would wait for the device. It did if the step's
    gradients were there before it and nothing stepped.

    Example::

        >>> attempts = Attempts()
        >>> attempts.tried(0); attempts.happened(0); attempts.tried(1)
        >>> attempts.failed()
        {1: 1}
        >>> attempts.failed()
        {}
    """

    def __init__(self) -> None:
        self._open: Counter[int] = Counter()

    def tried(self, optimizer: int) -> None:
        """Before a step that has gradients."""
        self._open[optimizer] += 1

    def happened(self, optimizer: int) -> None:
        """After a step."""
        self._open[optimizer] -= 1

    def failed(self) -> dict[int, int]:
        """At the end of a batch: for each optimizer the steps that did not happen since the last call."""
        failed = {optimizer: count for optimizer, count in self._open.items() if count > 0}
        self._open.clear()
        return failed
