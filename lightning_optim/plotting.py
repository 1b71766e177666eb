"""Share what every ``plot()`` has: axes, a title, labels, a legend, the mark of the best point, and one error.

Every ``plot`` of this package has the signature ``plot(metric_or_optimizer=None, *, ax=None)`` and returns a figure and
its axes. Colours are those of the style in force, so that a plot can be read on a light and on a dark background: a
line takes the next colour of its axes, and a mark the colour of their text. Matplotlib is imported when a plot is
drawn, not before.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

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
    if axes is None:
        return _pyplot().subplots(layout="constrained")
    figure = axes.get_figure()
    assert figure is not None
    return figure, axes  # type: ignore[return-value]


def panels(count: int, axes: Axes | None = None) -> tuple[Figure, list[Axes]]:
    """Return a figure and axes for each of several metrics, whose scales differ: small ones, with the same x-axis.

    Args:
        count: Number of metrics.
        axes: Axes to draw on, which then hold all metrics. Default: those of a new figure.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if axes is not None or count == 1:
        figure, axes = canvas(axes)
        return figure, [axes] * count
    columns = 1 if count <= 3 else 2
    rows = math.ceil(count / columns)
    size = (6.4 * columns, 2.4 * rows + 0.6)
    figure, grid = _pyplot().subplots(rows, columns, sharex=True, squeeze=False, figsize=size, layout="constrained")
    made = list(grid.flat)
    for unused in made[count:]:
        unused.remove()
    for above in made[max(0, count - columns) : count]:
        above.tick_params(labelbottom=True)  # also where no axes are below
    return figure, made[:count]


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`plot` needs matplotlib: `pip install matplotlib`") from error
    return pyplot


def ink(axes: Axes) -> Any:
    """Return the colour of the text of these axes, which can be seen on their background in every style."""
    return axes.xaxis.label.get_color()


def mark_best(axes: Axes, x: float, y: float, label: str) -> None:
    """Mark a point with a star, which the legend shows as ``label``; a value that is not finite has no mark."""
    if math.isfinite(x) and math.isfinite(y):
        style = {"markersize": 13.0, "markerfacecolor": "none", "markeredgewidth": 1.2, "linestyle": "none"}
        axes.plot([x], [y], marker="*", color=ink(axes), label=label, zorder=5, **style)  # type: ignore[arg-type]


def make_room_above(axes: Axes, x: float, values: Sequence[float]) -> None:
    """Extend the y-axis upwards by half the range of these values, so that a legend at the top covers none of them.

    Args:
        axes: The axes, on which the values are drawn already.
        x: A place on the x-axis that has values.
        values: All values that are drawn; those that are not finite are left out.
    """
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        low, high = min(finite), max(finite)
        axes.update_datalim([(x, high + 0.5 * (high - low))])
        axes.autoscale_view()


def outline(axes: Axes) -> dict[str, Any]:
    """Return the style of a line that can be seen on top of points: an edge in the colour of the background."""
    from matplotlib import patheffects

    return {"path_effects": [patheffects.withStroke(linewidth=2.4, foreground=axes.get_facecolor())]}


def log_scale(axes: Axes) -> None:
    """Make the y-axis logarithmic, with several labels in plain numbers; call it when all is drawn."""
    from matplotlib import ticker

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    major: ticker.Locator = ticker.LogLocator()
    if decades < 0.5:
        major = ticker.MaxNLocator(6)
    elif decades < 4.0:
        major = ticker.LogLocator(
            subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1.3 else (1.0, 2.0, 5.0), numticks=99
        )
    axes.yaxis.set_major_locator(major)
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def legend_beside(axes: Axes) -> None:
    """Write a legend that covers nothing that is drawn: below the axes, or within room that is made in them.

    A figure without a layout makes no room below its axes. Call it last: it changes the limits of the y-axis.
    """
    from matplotlib.transforms import ScaledTranslation

    figure, labels = axes.figure, axes.get_legend_handles_labels()[1]
    columns = 2 if max(map(len, labels)) < 40 else 1
    if figure.get_layout_engine() is not None:
        points = 3.6 * float(axes.xaxis.label.get_fontsize())  # for the numbers and the label of the x-axis
        place = axes.transAxes + ScaledTranslation(0.0, -points / 72.0, figure.dpi_scale_trans)
        where: dict[str, Any] = {"bbox_to_anchor": (0.5, 0.0), "bbox_transform": place, "borderaxespad": 0.0}
        axes.legend(fontsize="small", ncols=columns, loc="upper center", **where)
        return
    legend = axes.legend(fontsize="small", ncols=columns, loc="upper center")
    share = min(0.7, 1.2 * legend.get_window_extent().height / axes.get_window_extent().height)
    scale = axes.yaxis.get_transform()
    low, high = scale.transform(list(axes.get_ylim()))
    axes.set_ylim(top=float(scale.inverted().transform([low + (high - low) / (1.0 - share)])[0]))


def finish(
    axes: Axes,
    *,
    x: str | None = None,
    y: str | None = None,
    title: str | None = None,
    legend: Literal["best", "upper right"] = "best",
) -> None:
    """Write the labels, a title that fits the width, and a legend; an x-axis that counts gets whole numbers.

    Args:
        axes: The axes.
        x: Label of the x-axis, which counts steps, validations or members.
        y: Label of the y-axis, with the unit if there is one.
        title: The title. It is broken into lines.
        legend: Place of the legend.
    """
    from matplotlib.ticker import MaxNLocator

    if x is not None:
        if axes.xaxis.get_tick_params().get("labelbottom", True):  # no other axes with the same x-axis are below
            axes.set_xlabel(x)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if y is not None:
        axes.set_ylabel(y)
    if title is not None:
        axes.set_title(textwrap.fill(title, 70), fontsize="medium")
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize="small", loc=legend)


def finish_panels(axes: Sequence[Axes], names: Sequence[str], *, x: str, title: str) -> None:
    """Write the labels and legends of :func:`panels`, and one title.

    Args:
        axes: The axes of each metric, or the same ones for all.
        names: Names of the metrics.
        x: Label of the x-axis.
        title: The title.
    """
    if axes[0] is axes[-1]:
        finish(axes[0], x=x, y=names[0] if len(names) == 1 else "value of the metric", title=title)
        return
    for name, one in zip(names, axes, strict=True):
        finish(one, x=x, y=name)
    axes[0].figure.suptitle(textwrap.fill(title, 70), fontsize="medium")


def check_metric(metric: str | None, names: Collection[str]) -> str:
    """Check that there is a metric of this name, and return the name."""
    if metric is None or metric not in names:
        near = nearest(metric, names) if isinstance(metric, str) else ""
        raise ValueError(f"`metric_or_optimizer` must be one of {shown(names)}, got {metric!r}{near}")
    return metric


def nothing_to_plot(fix: str) -> RuntimeError:
    """Return the error of a plot without any values; ``fix`` says how to get some."""
    return RuntimeError(f"There is nothing to plot yet: {fix}")


def best_index(values: Sequence[float], mode: Literal["min", "max"] | None) -> int | None:
    """Return the index of the best finite value, the first of equal ones; ``None`` without one or without a mode."""
    finite = [index for index, value in enumerate(values) if math.isfinite(value)]
    if mode is None or not finite:
        return None
    return (min if mode == "min" else max)(finite, key=values.__getitem__)
