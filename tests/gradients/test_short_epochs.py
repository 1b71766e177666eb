"""GradientAccumulation says once that an epoch has fewer batches than a step shall have."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim import GradientAccumulation, ManualOptimizationMixin, TargetBatchSize
from tests.averaging.models import Model, data, fit
from tests.lightning import Callback


class Stream(IterableDataset[Any]):
    """The batches of a loader, without a length."""

    def __init__(self, count: int) -> None:
        self.batches = list(data(count))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def stream(count: int) -> DataLoader[Any]:
    return DataLoader(Stream(count), batch_size=None)


class Manual(ManualOptimizationMixin, Model):
    """Calls ``optimize`` twice in each batch; the first call of the last batch closes the window."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            self.optimize(Model.training_step(self, batch, batch_idx), self.optimizers())


class Leaving(Model):
    """Leaves one of two micro-batches out."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


class Stops(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = batch_idx == 1


class Leaves(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 2 else None


def said(model: Model, n: Any, train: Any, *callbacks: Callback, **options: Any) -> list[str]:
    """Return the warnings of a fit that are about accumulation."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, [GradientAccumulation(n), *callbacks], train=train, **options)
    return [str(one.message) for one in caught if "micro-batches for a step" in str(one.message)]


SHORT: dict[str, Any] = {
    "a loader with a length": (Model, 8, lambda: data(5), 0, 5),
    "a stream": (Model, 8, lambda: stream(5), 0, 5),
    "a dictionary of epochs": (Model, {0: 2, 1: 6}, lambda: data(5), 1, 5),
    "a target batch size": (Model, TargetBatchSize(32), lambda: data(5), 0, 5),
    "manual optimization": (Manual, 12, lambda: data(5), 0, 9),
}


@pytest.mark.parametrize("what", SHORT)
def test_a_short_epoch_is_told_once(what: str) -> None:
    module, n, train, epoch, largest = SHORT[what]
    (sentence,) = said(module(), n, train(), max_epochs=4)
    assert f"in epoch {epoch} no step has more than {largest}" in sentence
    assert f"Choose a size of at most {largest}" in sentence


ENOUGH: dict[str, Any] = {
    "as many": (Model, 5, lambda: data(5), {}),
    "a short last window": (Model, 4, lambda: data(5), {}),
    "a stream": (Model, 5, lambda: stream(5), {}),
    "manual optimization": (Manual, 9, lambda: data(5), {}),
    "a trial run": (Model, 8, lambda: data(5), {"fast_dev_run": True}),
    "micro-batches without a loss": (Leaving, 4, lambda: stream(5), {}),
    "the end of the run": (Model, 3, lambda: stream(8), {"max_steps": 1, "max_epochs": -1}),
}


@pytest.mark.parametrize("what", ENOUGH)
def test_nothing_is_said_where_nothing_is_wrong(what: str) -> None:
    module, n, train, options = ENOUGH[what]
    assert said(module(), n, train(), **options) == []


@pytest.mark.parametrize("other", [Stops(), Leaves()], ids=["a stop", "an epoch that is left"])
@pytest.mark.parametrize("train", [data, stream])
def test_an_epoch_that_something_else_ends_is_not_short(other: Callback, train: Any) -> None:
    assert said(Model(), 4, train(8), other, max_epochs=3) == []
