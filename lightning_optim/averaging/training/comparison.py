"""Raw against averaged weights, metric by metric, over the steps of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lightning_optim.plotting import canvas
from lightning_optim.runtime.lightning import Trainer
from lightning_optim.runtime.patching import patched


class Comparison:
    """The metrics of validations that were run twice: with raw weights, then with averaged ones.

    Attributes:
        points: For each validation its optimizer ``step``, and the metrics ``raw`` and ``averaged`` by name. While the
            second validation runs, and if it never ended, ``averaged`` is empty.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []

    def load(self, points: list[dict[str, Any]]) -> None:
        """Take over the points of an interrupted run."""
        self.points = list(points)

    @contextlib.contextmanager
    def adding(self, trainer: Trainer, steps: list[int], raw: dict[str, Tensor]) -> Iterator[None]:
        """Context manager: the validation in it is the second one, whose metrics are compared with ``raw``.

        The point is complete, and the raw metrics are logged with those of the average, before the first
        ``on_validation_end``: a checkpoint that is saved there holds it.
        """
        point = {"step": max(steps, default=0), "raw": {name: float(value) for name, value in raw.items()}}
        if self.points and self.points[-1]["step"] == point["step"] and not self.points[-1]["averaged"]:
            self.points.pop()  # of a validation that was cut short, and is run again after a resume
        self.points.append({**point, "averaged": {}})
        beside = {f"averaging/raw/{name}": value for name, value in raw.items()}
        connector = trainer._logger_connector
        log = connector.log_eval_end_metrics

        def log_both(metrics: dict[str, Any]) -> None:
            found = trainer.callback_metrics
            self.points[-1]["averaged"] = {name: float(found[name]) for name in raw if name in found}
            connector._callback_metrics.update(beside)
            log({**metrics, **beside})

        with patched(connector, "log_eval_end_metrics", log_both):
            yield

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
