"""A plot of gradient norms can be read: numbers on its axis, a legend that covers nothing, a bound that is seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import colors, pyplot

from lightning_optim.gradients.norm_plot import Norms, draw
from lightning_optim.plotting import canvas

matplotlib.use("agg")

STYLES = ("default", "dark_background")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


def norms(name: str, low: float, high: float, bound: float) -> Norms:
    before = torch.logspace(math.log10(low), math.log10(high), 40)
    bounds = torch.full((40,), bound)
    after = torch.minimum(before, bounds)
    return Norms(f"optimizer {name} (SGD)", 2.0, 40, before, after, bounds, (before > bounds).float())


def drawn(each: list[Norms], given: Any = None) -> tuple[Any, Any]:
    figure, axes = canvas(given)
    draw(axes, each, ("suggested bound (90th percentile)", 1.0) if len(each) == 1 else None)
    figure.canvas.draw()
    return figure, axes


@pytest.mark.parametrize("size", [(6.4, 4.8), (4.0, 3.0)])
@pytest.mark.parametrize("middle", [1.0, 0.003])
@pytest.mark.parametrize("ratio", [1.0, 1.2, 2.0, 4.0, 9.0, 30.0, 1e3, 1e7])
def test_the_axis_has_several_plain_numbers(ratio: float, middle: float, size: tuple[float, float]) -> None:
    low, high = middle / math.sqrt(ratio), middle * math.sqrt(ratio)
    _, axes = drawn([norms("0", low, high, 2.0 * middle)], pyplot.subplots(figsize=size, layout="constrained")[1])
    bottom, top = axes.get_ylim()
    shown = [
        tick.label1.get_text().replace("\N{MINUS SIGN}", "-")
        for tick in axes.yaxis.get_major_ticks()
        if bottom <= tick.get_loc() <= top
    ]
    minor = [tick.label1.get_text() for tick in axes.yaxis.get_minor_ticks()]
    assert 3 <= len(shown) <= 14 and len(set(shown)) == len(shown), shown
    assert [f"{float(text):g}" for text in shown] == shown and not any(minor)


@pytest.mark.parametrize("each", [["0"], ["0", "1"], ["0", "1", "2"]], ids=len)
@pytest.mark.parametrize("layout", ["own", "constrained", None])
def test_the_legend_covers_nothing(each: list[str], layout: Any) -> None:
    given = None if layout == "own" else pyplot.subplots(layout=layout)[1]
    figure, axes = drawn([norms(name, 1.0, 5.0, 3.0) for name in each], given)
    legend = axes.get_legend().get_window_extent()
    for line in axes.lines:
        points = axes.transData.transform(
            [(x, y) for x, y in zip(*line.get_data(), strict=True) if len(each) > 1 or x > 1]
        )
        assert not any(legend.contains(*point) for point in points), line.get_label()
    assert not legend.overlaps(axes.xaxis.get_tightbbox())
    assert figure.bbox.y0 <= legend.y0 and legend.y1 <= figure.bbox.y1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("count", [1, 2])
def test_the_bound_is_seen_where_every_step_is_clipped(count: int, style: str) -> None:
    with pyplot.style.context({**pyplot.style.library.get(style, {}), "figure.dpi": 300.0}):
        figure, axes = drawn([norms(str(index), 2.0 + index, 5.0, 1.0 + index) for index in range(count)])
        width, height = figure.canvas.get_width_height()
        buffer = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)
        pixels = buffer.view(height, width, 4)[..., :3].float() / 255.0
        x, y = (round(float(place)) for place in axes.transData.transform((20.0, 1.0)))
        around = pixels[height - y - 30 : height - y + 30, x - 30 : x + 30]  # the points of some steps
        bound, points = (
            next(line for line in axes.lines if words in str(line.get_label())) for words in ("in force", "after")
        )
        of_bound, of_points, of_background = (
            ((around - torch.tensor(colors.to_rgb(color))).abs().amax(-1) < 0.1)
            for color in (bound.get_color(), points.get_color(), axes.get_facecolor())
        )
        above, below = (of_points[rows].any(0) for rows in (slice(0, 27), slice(33, 60)))
        edge = of_background[25:29].any(0) & of_background[31:35].any(0) & of_bound[28:32].any(0)
        assert (above & below & edge).any(), "the bound, its edge, and the points on both sides"


def test_a_norm_of_zero_and_a_single_step() -> None:
    zero = torch.zeros(3)
    unknown = torch.full((3,), math.nan)
    drawn([Norms("optimizer 0 (SGD)", 2.0, 3, zero, unknown, unknown, unknown)])
    one = Norms("optimizer 0 (SGD)", 2.0, 1, torch.ones(1), torch.ones(1), torch.ones(1), torch.zeros(1))
    drawn([one])
    assert one.share_clipped == "0 % of 1 steps clipped"
