"""Collect and plot the metrics of raw and of averaged weights over the steps of a run (``compare=True``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightning_optim.base.metric_names import mode_of
from lightning_optim.base.policy import Policy
from lightning_optim.plotting import (
    best_index,
    check_metric,
    finish_panels,
    mark_best,
    nothing_to_plot,
    panels,
)
from lightning_optim.runtime.evaluated_weights import RAW_METRICS
from lightning_optim.runtime.lightning import Trainer, logger_connector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Comparison:
    """Collect the metrics of validations that ran twice: with the raw weights, then with the averaged ones.

    Attributes:
        points: A dictionary for each validation: the optimizer ``step``, and the metrics ``raw`` and ``averaged`` by
            name. ``averaged`` is empty until the second validation has ended.
        modes: For each metric that a callback of the run monitors, ``"min"`` or ``"max"``.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []
        self.modes: dict[str, Literal["min", "max"]] = {}

    def load(self, points: list[dict[str, Any]]) -> None:
        """Load the points of an interrupted run."""
        self.points = list(points)

    @contextlib.contextmanager
    def adding(self, trainer: Trainer, steps: list[int], raw: dict[str, Tensor]) -> Iterator[None]:
        """Context manager: add the metrics of the validation in it, which uses the averaged weights, and log ``raw``.

        Both happen before the first ``on_validation_end``, so that a checkpoint that is saved there holds the point.
        """
        point = {"step": max(steps, default=0), "raw": {name: float(value) for name, value in raw.items()}}
        if self.points and self.points[-1]["step"] == point["step"] and not self.points[-1]["averaged"]:
            self.points.pop()  # its validation was cut short, and is run again after a resume
        self.points.append({**point, "averaged": {}})
        self.modes = _modes_of(trainer.callbacks)
        beside = {f"{RAW_METRICS}{name}": value for name, value in raw.items()}

        def complete() -> dict[str, Tensor]:
            found = trainer.callback_metrics
            self.points[-1]["averaged"] = {name: float(found[name]) for name in raw if name in found}
            logger_connector.show_to_callbacks(trainer, beside)
            return beside

        with logger_connector.logging_beside_validation(trainer, complete):
            yield

    def plot(self, metric_or_optimizer: str | None = None, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot the metrics of both over the optimizer steps; see :meth:`WeightAveraging.plot`."""
        known = sorted({name for point in self.points for name in point["raw"]})
        if not known:
            raise nothing_to_plot(
                "no validation has compared raw and averaged weights. Pass `WeightAveraging(…, compare=True)` and train"
                " until a validation has ended."
            )
        names = known if metric_or_optimizer is None else [check_metric(metric_or_optimizer, known)]
        figure, axes = panels(len(names), ax)
        is_shared = axes[0] is axes[-1] and len(names) > 1
        for name, one in zip(names, axes, strict=True):
            self._draw(name, one, f"{name}, " if is_shared else "")
        finish_panels(axes, names, x="optimizer steps", title="Metrics of the raw and of the averaged weights")
        return figure, axes[0]

    def _draw(self, name: str, axes: Axes, prefix: str) -> None:
        """Draw a metric of both in one colour each, or in one colour with dashes if axes hold several metrics."""
        drawn: list[tuple[float, int, str]] = []
        color = None
        for kind in ("raw", "averaged"):
            shown = [(point["step"], point[kind][name]) for point in self.points if name in point[kind]]
            if not shown:
                continue  # no validation with the averaged weights has ended yet
            style: dict[str, Any] = {"linestyle": "--" if kind == "raw" else "-", "marker": "."}
            if prefix and color is not None:
                style["color"] = color
            (line,) = axes.plot(*zip(*shown, strict=True), label=f"{prefix}{kind}", **style)
            color = line.get_color()
            drawn += [(value, step, kind) for step, value in shown]
        best = best_index([value for value, *_ in drawn], self.modes.get(name) or mode_of(name))
        if best is not None:
            value, step, kind = drawn[best]
            mark_best(axes, step, value, f"{prefix}best {value:.4g}, {kind}, step {step:,}")


def _modes_of(things: Iterable[Any]) -> dict[str, Literal["min", "max"]]:
    """Return the mode of each metric that a ``ModelCheckpoint``, an early stopping or a criterion in it monitors."""
    found: dict[str, Literal["min", "max"]] = {}
    for thing in things:
        monitor, mode = getattr(thing, "monitor", None), getattr(thing, "mode", None)
        if isinstance(monitor, str) and mode in ("min", "max"):
            found[monitor] = mode
        criterion, inside = getattr(thing, "criterion", None), getattr(thing, "criteria", None)
        parts = [criterion, *(inside if isinstance(inside, list | tuple) else ())]
        # What other packages call a criterion may be anything, and may lead back to itself.
        found |= _modes_of([part for part in parts if isinstance(part, Policy)])
    return found
