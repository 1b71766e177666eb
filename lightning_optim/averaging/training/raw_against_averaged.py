"""Collect and plot the metrics of raw and of averaged weights over the steps of a run (``compare=True``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_optim.plotting import canvas, check_metric
from lightning_optim.runtime.lightning import Trainer, logger_connector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Comparison:
    """Collect the metrics of validations that ran twice: with the raw weights, then with the averaged ones.

    Attributes:
        points: A dictionary for each validation: the optimizer ``step``, and the metrics ``raw`` and ``averaged`` by
            name. ``averaged`` is empty until the second validation has ended.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []

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
        beside = {f"averaging/raw/{name}": value for name, value in raw.items()}

        def complete() -> dict[str, Tensor]:
            found = trainer.callback_metrics
            self.points[-1]["averaged"] = {name: float(found[name]) for name in raw if name in found}
            logger_connector.show_to_callbacks(trainer, beside)
            return beside

        with logger_connector.logging_beside_validation(trainer, complete):
            yield

    def plot(self, metric_or_optimizer: str | None = None, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot a metric of both over the steps; see :meth:`WeightAveraging.plot`."""
        names = sorted({name for point in self.points for name in point["raw"]})
        if not names:
            raise ValueError(
                "There is nothing to plot: no validation has compared raw and averaged weights. Pass `compare=True`."
            )
        only = names[0] if len(names) == 1 else None
        metric = check_metric(metric_or_optimizer or only, names)
        figure, ax = canvas(ax)
        for kind in ("raw", "averaged"):
            shown = [(point["step"], point[kind][metric]) for point in self.points if metric in point[kind]]
            ax.plot(*zip(*shown, strict=True), marker=".", label=kind)
        ax.set_xlabel("optimizer steps")
        ax.set_ylabel(metric)
        ax.legend()
        return figure, ax
