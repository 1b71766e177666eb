"""Make the figure of a ``plot()``. Matplotlib is imported when a plot is drawn, not before."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from lightning_optim.base.suggestions import nearest, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def canvas(axes: Axes | None = None) -> tuple[Figure, Axes]:
    """Return a figure and its axes, as torchmetrics' ``plot()`` does.

    Args:
        axes: Axes to draw on; a new figure by default.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`plot` needs matplotlib: `pip install matplotlib`") from error
    if axes is None:
        return pyplot.subplots(layout="constrained")
    figure = axes.get_figure()
    assert figure is not None
    return figure, axes  # type: ignore[return-value]


def check_metric(metric: str | None, names: Collection[str]) -> str:
    """Check that there is a metric of this name, and return the name."""
    if metric is None or metric not in names:
        near = nearest(metric, names) if isinstance(metric, str) else ""
        raise ValueError(f"`metric_or_optimizer` must be one of {shown(names)}, got {metric!r}{near}")
    return metric
