"""The counters of a torchmetrics metric, beside its state."""

from __future__ import annotations

from torchmetrics import Metric

from lightning_optim.runtime.lightning.private_names import write_private


def restore_(metric: Metric, updates: int) -> None:
    """Let a metric, whose state was set, go on as after this number of updates: it computes its value anew."""
    write_private(metric, "_update_count", updates)
    forget_value_(metric)


def forget_value_(metric: Metric) -> None:
    """Let a metric, whose state was set, compute its value anew."""
    write_private(metric, "_computed", None)
