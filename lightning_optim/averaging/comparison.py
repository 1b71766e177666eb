"""Raw against averaged weights, metric by metric, over the steps of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_optim.figures import canvas


class Comparison:
    """What validations of both have given.

    Attributes:
        points: For each validation ``step``, and the metrics ``raw`` and ``averaged`` by name.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []

    def load(self, points: list[dict[str, Any]]) -> None:
        """Take over the points of an interrupted run."""
        self.points = list(points)

    def add(self, trainer: Trainer, steps: list[int], raw: dict[str, Tensor]) -> None:
        """Keep the metrics of raw weights, and those that the Trainer has now; tell loggers the former."""
        of_raw = {name: float(value) for name, value in raw.items()}
        of_average = {name: float(trainer.callback_metrics[name]) for name in raw if name in trainer.callback_metrics}
        self.points.append({"step": max(steps, default=0), "raw": of_raw, "averaged": of_average})
        logged = {f"averaging/raw/{name}": value for name, value in of_raw.items()}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def plot(self, metric: str | None = None) -> tuple[Any, Any]:
        """The metric of both over the steps: figure and axes."""
        names = sorted({name for point in self.points for name in point["raw"]})
        if not names:
            raise ValueError("there is nothing to plot: no validation has compared, which takes `compare=True`")
        metric = names[0] if metric is None and len(names) == 1 else metric
        if metric is None or metric not in names:
            raise ValueError(f"`metric` must be one of {names}, got {metric!r}")
        figure, axes = canvas()
        for kind in ("raw", "averaged"):
            shown = [(point["step"], point[kind][metric]) for point in self.points if metric in point[kind]]
            axes.plot(*zip(*shown, strict=True), marker=".", label=kind)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(metric)
        axes.legend()
        return figure, axes
