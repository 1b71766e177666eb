"""A patience that the run is too short for is told once, before the first step; nothing is told of any other."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim import (
    AllOf,
    AnyOf,
    AtLeast,
    Criterion,
    Divergence,
    EarlyStopping,
    GradientAccumulation,
    NonFinite,
    Plateau,
    Threshold,
)
from tests.lightning import Callback, Trainer
from tests.stopping.scripted_fits import BATCHES, Scripted, data, fit, trainer

FALLING = [9.0 - index for index in range(60)]


class Steps(Callback):
    """Note how many warnings there were at the first step."""

    def __init__(self, said: list[Any]) -> None:
        self.said, self.before = said, -1

    def on_train_batch_start(self, running: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.before = len(told(self.said)) if self.before < 0 else self.before


def told(said: list[Any]) -> list[str]:
    return [str(one.message) for one in said if "cannot stop this run" in str(one.message)]


def messages(stop: EarlyStopping, *callbacks: Callback, module: Any = None, **options: Any) -> list[str]:
    """Return the warnings of a fit; all of them come before the first step."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        steps = Steps(said)
        fit(module or Scripted({"val_loss": FALLING, "other": FALLING}), stop, *callbacks, steps, **options)
    assert len(told(said)) in (0, 1) and steps.before in (-1, len(told(said)))
    return told(said)


# Trainer, the number of its validations. The largest patience that can stop it is one less: the first one improves.
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "epochs": ({"max_epochs": 6}, 6),
    "every second epoch": ({"max_epochs": 13, "check_val_every_n_epoch": 2}, 6),
    "twice an epoch": ({"max_epochs": 4, "val_check_interval": 0.5}, 8),
    "every third batch": ({"max_epochs": 6, "val_check_interval": 3}, 6),
    "every batch, over epochs": ({"max_epochs": 2, "val_check_interval": 1, "check_val_every_n_epoch": None}, 8),
    "every batch, read at the end of epochs as Lightning does": ({"max_epochs": 6, "val_check_interval": 1}, 6),
    "every third batch, over epochs": ({"max_epochs": 5, "val_check_interval": 3, "check_val_every_n_epoch": None}, 6),
    "steps": ({"max_epochs": -1, "max_steps": 6 * BATCHES + 1, "check_val_every_n_epoch": 1}, 7),
    "steps, twice an epoch": ({"max_epochs": -1, "max_steps": 3 * BATCHES + 3, "val_check_interval": 2}, 7),
    "steps and epochs": ({"max_epochs": 6, "max_steps": 1000}, 6),
    "fewer batches": ({"max_epochs": 8, "limit_train_batches": 2, "limit_val_batches": 1}, 8),
    "accumulation": ({"max_epochs": -1, "max_steps": 6, "accumulate_grad_batches": 4}, 6),
    "overfitting": ({"max_epochs": 6, "overfit_batches": 2}, 6),
    "most of the data": ({"max_epochs": 6, "val_check_interval": 0.75}, 6),
}


@pytest.mark.parametrize("run", RUNS)
def test_the_validations_are_counted(run: str) -> None:
    options, validations = RUNS[run]
    assert messages(EarlyStopping("val_loss", patience=validations - 1), **options) == []
    (message,) = messages(stop := EarlyStopping("val_loss", patience=validations), **options)
    assert f"`patience={validations}` stops at validation {validations + 1} at the earliest" in message
    assert f"the run has {validations}. " in message and "`patience=math.inf`" in message
    assert len(stop.history) == validations, "this is how many there were"


def test_ours_accumulates() -> None:
    for n in (4, {0: 1, 2: 4}):
        stop = EarlyStopping("val_loss", patience=40)
        (message,) = messages(stop, GradientAccumulation(n), max_epochs=-1, max_steps=12)
        assert f"the run has {len(stop.history)}. " in message


def test_a_patience_that_is_just_reached_stops() -> None:
    stop = EarlyStopping("val_loss", patience=5)
    assert messages(stop, module=Scripted([1.0] * 9), max_epochs=7) == []
    assert stop.stopped_epoch == 5


@pytest.mark.parametrize(
    ("patience", "options"),
    [
        (math.inf, {"max_epochs": 2}),
        (3, {"max_epochs": 2}),  # the default, which nobody has asked for
        (50, {"max_epochs": -1, "max_time": {"seconds": 1}}),
        (50, {"fast_dev_run": True}),
        (50, {"max_epochs": 2, "limit_val_batches": 0, "check": True}),
    ],
)
def test_nothing_is_said(patience: float, options: dict[str, Any]) -> None:
    check = True if options.pop("check", False) else None
    monitor = "train_loss_epoch" if check else "val_loss"
    stop = EarlyStopping(monitor, patience=patience, check_on_train_epoch_end=check)
    said = messages(stop, module=Scripted([]), **options)
    assert said == [] or check, "training has an end of an epoch without validations"


def test_a_loader_without_a_length_has_a_validation_an_epoch() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            generator = torch.Generator().manual_seed(0)
            for _ in range(8):
                yield torch.randn(3, generator=generator), torch.zeros(1)

    def run(patience: int, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            stop = EarlyStopping("val_loss", patience=patience)
            trainer(stop, **options).fit(Scripted(), DataLoader(Stream(), 4), data(seed=1))
        return told(said)

    assert run(4, max_epochs=5) == []
    assert len(run(5, max_epochs=5)) == 1
    assert run(50, max_epochs=2, val_check_interval=2) == []
    assert run(50, max_epochs=-1, max_steps=4) == []


def test_manual_optimization_takes_any_number_of_steps() -> None:
    class Manual(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.net(batch[0]).square().mean()
            self.manual_backward(loss)
            if batch_idx == 0:
                optimizer.step()

    assert messages(EarlyStopping("val_loss", patience=50), module=Manual(), max_epochs=-1, max_steps=3) == []
    assert len(messages(EarlyStopping("val_loss", patience=50), module=Manual(), max_epochs=3)) == 1


class Mine(Criterion):
    def __init__(self) -> None:
        self.monitor = "val_loss"

    def update(self, metrics: Any) -> bool:
        return False


class Lenient(Plateau):
    def better(self, value: Any, than: float) -> bool:
        return False


LONG, SHORT = Plateau("val_loss", patience=20), Plateau("other", patience=4)


@pytest.mark.parametrize(
    ("criterion", "can_stop"),
    [
        (LONG, False),
        (SHORT, True),
        (AnyOf(LONG, SHORT), True),
        (AllOf(LONG, SHORT), False),
        (AllOf(SHORT, SHORT), True),
        (AnyOf(NonFinite("val_loss"), LONG), False),
        (AnyOf(NonFinite("val_loss"), Threshold("val_loss", 0.0), LONG), True),
        (AnyOf(Divergence("val_loss", 99.0), LONG), True),
        (AllOf(Threshold("val_loss", 0.0), LONG), False),
        (AtLeast(2, LONG, SHORT, Threshold("other", 1.0)), True),
        (AtLeast(3, LONG, SHORT, Threshold("other", 1.0)), False),
        (AllOf(LONG, Plateau("other", patience=math.inf)), True),  # never, by intention
        (NonFinite("val_loss"), True),
        (Mine(), True),
        (AllOf(AnyOf(LONG, Mine()), SHORT), True),
        (Lenient("val_loss", patience=10), True),  # its first one is no improvement
        (Lenient("val_loss", patience=11), False),
    ],
    ids=repr,
)
def test_criteria(criterion: Criterion, can_stop: bool) -> None:
    stop = EarlyStopping(criterion, best_by="val_loss")
    said = messages(stop, max_epochs=10)
    assert len(said) == (not can_stop)
    assert can_stop or (f"{criterion!r} stops at validation" in said[0] and "the run has 10. " in said[0])


def test_a_resumed_run_is_counted_from_its_start(tmp_path: Path) -> None:
    """Four of six epochs are left, and a patience of five is right for the whole run."""
    first = trainer(EarlyStopping("val_loss", patience=5), max_epochs=2)
    with pytest.warns(UserWarning, match="the run has 2"):
        first.fit(Scripted(FALLING), data(), data(seed=1))
    first.save_checkpoint(tmp_path / "two.ckpt")
    stop = EarlyStopping("val_loss", patience=5)
    assert messages(stop, module=Scripted(FALLING), ckpt_path=tmp_path / "two.ckpt", max_epochs=6) == []
    assert len(stop.history) == 6


def test_a_subclass_may_read_the_metric_at_other_times() -> None:
    class Often(EarlyStopping):
        def _should_skip_check(self, trainer: Trainer) -> bool:
            return True

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if "val_loss" in trainer.callback_metrics:
                self._run_early_stopping_check(trainer)

    assert messages(Often("val_loss", patience=9), max_epochs=4) == []
