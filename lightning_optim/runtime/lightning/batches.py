"""Read the number of samples in a batch as Lightning does."""

from __future__ import annotations

from typing import Any

from lightning_optim.runtime.lightning.packages import of_any_package


def batch_size_of(batch: Any) -> int:
    """Return the number of samples by which Lightning weights a batch: the first dimension of its first tensor."""
    return of_any_package("extract_batch_size", "utilities.data")(batch)
