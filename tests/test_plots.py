"""Test that every `plot()` of this package has the same signature, and draws on the axes that it gets."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import matplotlib
import pytest
from torchmetrics import Metric

import lightning_optim
from lightning_optim import EMA, EarlyStopping, GradientMonitor, Plateau, WeightAveraging
from lightning_optim.averaging.training.raw_against_averaged import Comparison
from lightning_optim.ensembling.cost_benefit import Cost, CostBenefit
from tests.harness.cells import Cell
from tests.integration.entry_fits import fit
from tests.registry import BY_NAME

matplotlib.use("agg")


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


MAKE: dict[type, Callable[[], Any]] = {
    Comparison: comparison,
    CostBenefit: lambda: CostBenefit("loss", (Cost(1, 2.0, 1.0, 3.0, 1.0, 1.0), Cost(2, 1.0, 1.0, 1.0, 2.0, 2.0))),
    EarlyStopping: lambda: EarlyStopping(Plateau("loss")),
    GradientMonitor: monitor,
    WeightAveraging: average,
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
