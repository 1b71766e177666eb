"""`total_steps` is the number of steps that each optimizer will really take, known before the first."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_optim import GradientAccumulation, OptimCallback, total_steps
from tests.harness import models
from tests.harness.cells import Cell
from tests.integration.entry_fits import RestartedLoader, fit
from tests.lightning import GradientAccumulationScheduler
from tests.registry import BY_NAME

RUNS: dict[str, tuple[Any, list[Any], dict[str, Any], float]] = {
    "plain": ("automatic", [], {"max_epochs": 3}, 18),
    "manual": ("manual", [], {"max_epochs": 3}, 18),
    "two": ("two", [], {"max_epochs": 3}, 18),
    "accumulation": ("automatic", [GradientAccumulation(4)], {"max_epochs": 3}, 6),
    "manual accumulation": ("manual", [GradientAccumulation(4)], {"max_epochs": 3}, 6),
    "two, accumulation": ("two", [GradientAccumulation(4)], {"max_epochs": 3}, 6),
    "by epoch": ("automatic", [GradientAccumulation({0: 4, 2: 1})], {"max_epochs": 4}, 16),
    "two, by epoch": ("two", [GradientAccumulation({1: 6, 2: 5})], {"max_epochs": 3}, 9),
    "Lightning's flag": ("automatic", [], {"max_epochs": 3, "accumulate_grad_batches": 4}, 6),
    "Lightning's scheduler": ("automatic", [GradientAccumulationScheduler({0: 4, 1: 3})], {"max_epochs": 3}, 6),
    "max_steps": ("automatic", [GradientAccumulation(4)], {"max_steps": 5, "max_epochs": -1}, 5),
    "max_steps first": ("automatic", [], {"max_steps": 7, "max_epochs": 3}, 7),
    "max_epochs first": ("automatic", [], {"max_steps": 100, "max_epochs": 3}, 18),
    "two, max_steps": ("two", [], {"max_steps": 8, "max_epochs": 3}, 4),
    "fewer batches": ("automatic", [GradientAccumulation(4)], {"max_epochs": 3, "limit_train_batches": 5}, 6),
}


class Asking(OptimCallback):
    """Ask in several hooks."""

    def ask(self, trainer: Any, *_: Any) -> None:
        vars(self).setdefault("answers", []).append(total_steps(trainer))

    on_fit_start = on_train_epoch_start = on_train_end = ask


class Counting(OptimCallback):
    """Count the steps."""


@pytest.mark.parametrize("run", RUNS)
def test_total_is_what_happens(run: str) -> None:
    kind, callbacks, options, expected = RUNS[run]
    cell, asking, counting = Cell(kind, "32-true", "single", "4short"), Asking(), Counting()
    fit(BY_NAME["plain"], cell, RestartedLoader, callbacks=[counting, asking, *callbacks], **options)
    assert counting.steps == [expected] * cell.optimizers
    assert set(asking.answers) == {expected}  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [1, 4, {0: 4, 1: 1}])
def test_estimated_stepping_batches(n: Any) -> None:
    """Lightning's own number is right for an int, also in `configure_optimizers`, and wrong for a dictionary."""

    class Estimating:
        def configure_optimizers(self: Any) -> Any:
            self.estimated, self.total = self.trainer.estimated_stepping_batches, total_steps(self.trainer)
            return super().configure_optimizers()  # type: ignore[misc]

    counting = Counting()
    cell = Cell("automatic", "32-true", "single", "4short")
    fitted = fit(BY_NAME["plain"], cell, Estimating, callbacks=[counting, GradientAccumulation(n)])
    assert [fitted.module.total] == counting.steps
    assert (fitted.module.estimated == counting.steps[0]) == isinstance(n, int)


def test_without_an_end() -> None:
    answers: list[Any] = []

    class Endless:
        def train_dataloader(self: Any) -> Any:
            return iter(models.Model.train_dataloader(self))

        def on_train_start(self: Any) -> None:
            answers.append(total_steps(self.trainer))

    fit(BY_NAME["plain"], Cell("automatic", "32-true", "single", "1"), Endless, callbacks=[], max_epochs=1)
    assert answers == [math.inf]
