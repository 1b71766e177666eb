"""The figure of every ``plot()``: matplotlib is imported only when somebody asks for a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def canvas(axes: Axes | None = None) -> tuple[Figure, Axes]:
    """A figure and its axes, as torchmetrics' ``plot()`` returns them.

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
