"""Restore the counters of a torchmetrics metric, which are not in its state, and plot its values."""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric

from lightning_optim.runtime.lightning.private_names import read_private, write_private


def restore_(metric: Metric, updates: int) -> None:
    """Let a metric, whose state was set, go on as after this number of updates: it computes its value anew."""
    write_private(metric, "_update_count", updates)
    forget_value_(metric)


def forget_value_(metric: Metric) -> None:
    """Let a metric, whose state was set, compute its value anew."""
    write_private(metric, "_computed", None)


def plot(metric: Metric, value: Any, ax: Any) -> Any:
    """Plot a value, several values, or the metric's present one, and return the figure and axes.

    Each ``plot`` of torchmetrics calls this, with annotations of its own.
    """
    return read_private(metric, "_plot")(value, ax)
