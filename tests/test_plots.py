"""Test that every `plot()` of this package has the same signature, and draws on the axes that it gets."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import colors, pyplot
from torchmetrics import Metric

import lightning_optim
from lightning_optim import (
    EMA,
    L1,
    AnyOf,
    EarlyStopping,
    GradientMonitor,
    MaxNorm,
    Plateau,
    ProximalL1,
    Threshold,
    WeightAveraging,
    WeightRegularization,
)
from lightning_optim.averaging.training.raw_against_averaged import Comparison
from lightning_optim.ensembling.cost_benefit import Cost, CostBenefit
from lightning_optim.regularization.term_history import TermHistory, draw
from lightning_optim.stopping.stopping_reason import EarlyStoppingReason
from tests.harness.cells import Cell
from tests.integration.entry_fits import fit
from tests.lightning import ModelCheckpoint
from tests.registry import BY_NAME

matplotlib.use("agg")

STYLES = ("default", "dark_background")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


def wanted(self: Any, metric_or_optimizer: Any = None, *, ax: Any = None) -> tuple[Any, Any]:
    """Give the signature that every plot must have."""
    raise NotImplementedError


def shape(plot: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(plot).parameters.values()]


def plotting_classes() -> set[type]:
    """Find every class of the package that defines `plot`, except metrics of torchmetrics."""
    names = [each.name for each in pkgutil.walk_packages(lightning_optim.__path__, "lightning_optim.")]
    modules = map(importlib.import_module, names)
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    ours = {found for found in classes if found.__module__.partition(".")[0] == "lightning_optim"}
    return {found for found in ours if "plot" in vars(found) and not issubclass(found, Metric)}


def monitor() -> GradientMonitor:
    monitor = GradientMonitor()
    fit(BY_NAME["plain"], Cell("automatic", "32-true", "single", "1"), callbacks=[monitor])
    return monitor


def comparison() -> Comparison:
    comparison = Comparison()
    comparison.load([{"step": step, "raw": {"loss": 2.0}, "averaged": {"loss": 1.0}} for step in (1, 2)])
    return comparison


def average() -> WeightAveraging:
    average = WeightAveraging(EMA(0.9), compare=True)
    average.comparison.load(comparison().points)
    return average


def stopping() -> EarlyStopping:
    stop = EarlyStopping(Plateau("loss"))
    stop.history, stop.best_check = [{"loss": 2.0}, {"loss": 1.0}], 1
    return stop


def regularization() -> WeightRegularization:
    callback = WeightRegularization(L1(0.2))
    fit(BY_NAME["plain"], Cell("automatic", "32-true", "single", "1"), callbacks=[callback])
    return callback


MAKE: dict[type, Callable[[], Any]] = {
    Comparison: comparison,
    CostBenefit: lambda: CostBenefit(
        "loss", (Cost(1, 2.0, 0.2, 1.0, 3.0, 1.0, 1.0), Cost(2, 1.0, 0.2, 1.0, 1.0, 2.0, 2.0))
    ),
    EarlyStopping: stopping,
    GradientMonitor: monitor,
    WeightAveraging: average,
    WeightRegularization: regularization,
}


def test_each_class_with_a_plot_is_here() -> None:
    assert plotting_classes() == set(MAKE)


@pytest.mark.parametrize("kind", MAKE, ids=lambda kind: kind.__name__)
def test_the_signature(kind: Any) -> None:
    assert shape(kind.plot) == shape(wanted)
    assert "metric_or_optimizer:" in kind.plot.__doc__ or "see :meth:" in kind.plot.__doc__


@pytest.mark.parametrize("kind", MAKE, ids=lambda kind: kind.__name__)
def test_it_returns_the_figure_and_axes_that_it_drew_on(kind: Any) -> None:
    made = MAKE[kind]()
    figure, axes = made.plot()
    assert axes.figure is figure and axes.lines
    other, given = matplotlib.pyplot.subplots()
    assert made.plot(ax=given) == (other, given)
    assert len(given.lines) == len(axes.lines)


@pytest.mark.parametrize("kind", MAKE, ids=lambda kind: kind.__name__)
def test_what_is_not_there_cannot_be_plotted(kind: Any) -> None:
    made = MAKE[kind]()
    with pytest.raises((ValueError, RuntimeError)):
        made.plot(9 if kind is GradientMonitor else "missing")


def test_of_many_layers_those_with_most_and_fewest_zeros_are_named() -> None:
    history = TermHistory()
    names = [f"regularization/zeros/layer{index}" for index in range(30)]
    history.append(
        1, {"regularization/zeros": torch.tensor(0.5), **{n: torch.tensor(i / 30) for i, n in enumerate(names)}}
    )
    _, axes = draw(history, None, None)
    assert len(axes.lines) == 31
    shown = axes.get_legend_handles_labels()[1]
    assert shown == ["all", *(f"layer{index}" for index in (0, 1, 2, 3, 4, 25, 26, 27, 28, 29))]


def test_zeros_have_a_panel_of_their_own() -> None:
    callback = WeightRegularization([L1(0.2), ProximalL1(2.0)])
    fit(BY_NAME["plain"], Cell("automatic", "32-true", "single", "1"), callbacks=[callback])
    figure, axes = callback.plot()
    assert [one.get_ylabel() for one in figure.axes] == ["value, as of the loss", "share of zeros"]
    assert [line.get_label() for line in axes.lines] == ["all", "net.inner.weight", "net.outer.weight"]
    assert len(callback.plot("penalties")[0].axes) == len(callback.plot("zeros")[0].axes) == 1
    assert callback.plot(ax=pyplot.figure().subplots())[1].get_ylabel() == "value, as of the loss"
    with pytest.raises(ValueError, match="must be one of"):
        callback.plot("zeroes")


def test_a_penalty_alone_is_named_in_the_title() -> None:
    assert regularization().plot()[1].get_title() == "Penalty on the weights: l1"


def test_the_title_says_which_of_several_optimizers_it_shows() -> None:
    callback = WeightRegularization([L1(0.2), ProximalL1(2.0)])
    fit(BY_NAME["plain"], Cell("two", "32-true", "single", "1"), callbacks=[callback])
    penalty, zeros = callback.plot(1)[0].axes
    assert penalty.get_title() == "Penalty on the weights of optimizer 1: l1"
    assert zeros.get_title() == "Share of weights of optimizer 1 that are exactly zero"


@pytest.mark.parametrize(("first", "last", "scale"), [(1.0, 9.0, "linear"), (1.0, 11.0, "log"), (0.0, 11.0, "linear")])
def test_penalties_over_more_than_a_decade_have_a_logarithmic_axis(first: float, last: float, scale: str) -> None:
    history = TermHistory()
    for step, value in ((1, first), (2, last)):
        history.append(step, {"regularization/l1": torch.tensor(value)})
    assert draw(history, None, None)[1].get_yscale() == scale


@pytest.mark.parametrize(("share", "seen"), [(0.02, False), (0.5, True)])
def test_a_small_share_of_zeros_can_be_read(share: float, seen: bool) -> None:
    history = TermHistory()
    for step in (1, 2):
        history.append(step, {"regularization/zeros": torch.tensor(share * (step - 1))})
    bottom, top = draw(history, None, None)[1].get_ylim()
    assert bottom == 0.0
    assert bool(top == 1.0) is seen and top > share


def test_terms_that_log_nothing_have_nothing_to_plot() -> None:
    with pytest.raises(RuntimeError, match=r"MaxNorm\(3.0\)\) has nothing to plot: only penalties"):
        WeightRegularization(MaxNorm(3.0)).plot()


OF_METRICS = [kind for kind in MAKE if kind not in (GradientMonitor, WeightRegularization)]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", MAKE, ids=lambda kind: kind.__name__)
def test_title_labels_and_colours_that_can_be_seen(kind: Any, style: str) -> None:
    with pyplot.style.context(style):
        figure, axes = MAKE[kind]().plot()
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
        background = colors.to_rgb(figure.get_facecolor())
        for one in figure.axes:
            drawn = [line.get_color() for line in one.lines] + [one.title.get_color(), one.yaxis.label.get_color()]
            for color in map(colors.to_rgb, drawn):
                assert max(abs(a - b) for a, b in zip(color, background, strict=True)) > 0.4, color


@pytest.mark.parametrize("kind", OF_METRICS, ids=lambda kind: kind.__name__)
def test_the_best_point_has_a_star(kind: Any) -> None:
    _, axes = MAKE[kind]().plot()
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    known = [point for line in axes.lines if line is not star for point in line.get_xydata().tolist()]
    assert star.get_xydata().tolist() == [min(known, key=lambda point: point[1])]
    assert star.get_label().startswith("best ")
    assert star.get_label() in [text.get_text() for text in axes.get_legend().get_texts()]


# ---- several metrics ----


def several() -> WeightAveraging:
    average = WeightAveraging(EMA(0.9), compare=True)
    values = [("val_loss", 3.0, 2.0), ("val_accuracy", 0.5, 0.7), ("score", 5.0, 4.0), ("lr", 1.0, 1.0)]
    for step in (10, 20):
        raw, averaged = ({row[0]: row[kind] * step for row in values} for kind in (1, 2))
        average.comparison.points.append({"step": step, "raw": raw, "averaged": averaged})
    return average


def test_an_average_draws_each_metric_in_axes_of_its_own() -> None:
    figure, axes = several().plot()
    assert axes is figure.axes[0] and figure.get_suptitle()
    drawn = {one.get_ylabel(): [*one.lines] for one in figure.axes}
    assert list(drawn) == ["lr", "score", "val_accuracy", "val_loss"]
    labels = {name: [line.get_label() for line in lines] for name, lines in drawn.items()}
    assert labels["score"] == ["raw", "averaged"], "nothing says whether more is better"
    assert labels["val_loss"] == ["raw", "averaged", "best 20, averaged, step 10"]
    assert labels["val_accuracy"] == ["raw", "averaged", "best 14, averaged, step 20"]
    assert drawn["score"][0].get_xydata().tolist() == [[10.0, 50.0], [20.0, 100.0]]
    assert [bool(one.get_xlabel()) for one in figure.axes] == [False, False, True, True]


def test_axes_that_are_given_hold_all_metrics() -> None:
    _, given = pyplot.subplots()
    assert several().plot(ax=given)[1] is given
    lines = {line.get_label(): line for line in given.lines}
    for name in ("lr", "score", "val_accuracy", "val_loss"):
        raw, averaged = lines[f"{name}, raw"], lines[f"{name}, averaged"]
        assert raw.get_color() == averaged.get_color() and raw.get_linestyle() != averaged.get_linestyle()
    assert len({line.get_color() for name, line in lines.items() if "averaged" in name and "best" not in name}) == 4
    _, single = several().plot("score")
    assert [line.get_label() for line in single.lines] == ["raw", "averaged"] and single.get_ylabel() == "score"


def test_the_callbacks_of_the_run_say_which_value_is_best(tmp_path: Path) -> None:
    average = WeightAveraging(EMA(0.9), compare=True)
    other = "averaging/raw/val_loss"
    stop = EarlyStopping(AnyOf([Plateau("val_loss"), Threshold(other, 9.0, mode="max")]), best_by="val_loss")
    callbacks = [average, stop, ModelCheckpoint(tmp_path)]
    with pytest.warns(UserWarning, match=f"the largest value of '{other}'"):
        fit(BY_NAME["plain"], Cell("automatic", "32-true", "single", "1"), callbacks=callbacks)
    assert average.comparison.modes == {"val_loss": "min", other: "max"}


def test_a_validation_that_is_not_complete_and_values_that_are_not_finite() -> None:
    average = WeightAveraging(EMA(0.9), compare=True)
    points = average.comparison.points
    points.append({"step": 1, "raw": {"loss": float("nan")}, "averaged": {}})
    _, axes = average.plot()
    assert [line.get_label() for line in axes.lines] == ["raw"], "no best"
    points[0]["averaged"] = {"loss": float("inf")}
    points.append({"step": 2, "raw": {"loss": 1.0}, "averaged": {"loss": 2.0}})
    _, axes = average.plot()
    assert axes.lines[-1].get_label() == "best 1, raw, step 2"


@pytest.mark.parametrize("kind", [EarlyStopping, GradientMonitor, WeightAveraging], ids=lambda kind: kind.__name__)
def test_nothing_to_plot(kind: Any) -> None:
    made = {EarlyStopping: ("loss",), WeightAveraging: (EMA(0.9),)}.get(kind, ())
    with pytest.raises(RuntimeError, match="rain"):  # "Train …", "train …"
        kind(*made).plot()


def test_the_plot_of_a_stop_has_a_short_title_and_a_scale_on_which_all_of_a_loss_is_seen() -> None:
    stop = EarlyStopping(AnyOf([Plateau("loss"), Plateau("accuracy", mode="max")]), best_by="loss")
    stop.history = [{"loss": loss, "accuracy": 0.9 - loss / 3} for loss in (2.6, 0.3, 0.1, 0.2)]
    stop.best_check, stop._reason = 2, EarlyStoppingReason.PATIENCE_EXHAUSTED
    stop.stopping_reason_message = "A sentence. " * 20
    figure, _ = stop.plot()
    assert [one.get_yscale() for one in figure.axes] == ["log", "linear"]
    assert figure._suptitle.get_text() == "Stopped in epoch 0: no improvement"
    _, given = matplotlib.pyplot.subplots()
    stop.plot("loss", ax=given)
    assert given.get_yscale() == "linear", "the scale of axes that are passed is the user's"
    stop.history = [{"loss": loss, "accuracy": 0.5} for loss in (2.6, 0.0)]
    stop.best_check = 1
    assert stop.plot("loss")[1].get_yscale() == "linear"
    alone = EarlyStopping("loss", patience=5)
    alone.history, alone._reason = [{"loss": 1.0}], EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert alone.plot()[1].get_title() == "Stopped in epoch 0: patience 5"
