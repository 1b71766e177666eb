"""The first run says at its start that its checkpoints will not resume exactly, and nothing if they will."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim import EMA, ExactResume, GradientAccumulation, WeightAveraging
from tests.lightning import Callback, ModelCheckpoint
from tests.resume.killed_runs import fit
from tests.resume.models import BATCHES, ManualNet, Net, PositionLoader, data, shuffling

TOLD = "will not be exact"


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(data())


def stream() -> DataLoader[Any]:
    return DataLoader(Stream(), batch_size=4)


class Steps(Callback):
    def __init__(self, said: list[Any]) -> None:
        self.said, self.before = said, -1

    def on_train_batch_start(self, *args: Any) -> None:
        self.before = len(told(self.said)) if self.before < 0 else self.before


def told(said: list[Any]) -> list[str]:
    return [str(one.message) for one in said if TOLD in str(one.message)]


def messages(callbacks: list[Callback], loader: Callable[[], Any] = shuffling, **options: Any) -> list[str]:
    """Return the warnings of a fit; all of them come before the first step."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        steps = Steps(said)
        fit([*callbacks, steps], loader, **({"val_check_interval": 1.0} | options))
    assert steps.before == len(told(said)) <= 1
    return told(said)


@pytest.fixture
def saver(tmp_path: Path) -> Callable[..., ModelCheckpoint]:
    return lambda **options: ModelCheckpoint(tmp_path, **options)


WITHIN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "steps": ({"every_n_train_steps": 4}, {}, r"`ModelCheckpoint(every_n_train_steps=4)` writes in the middle"),
    "the clock": ({"train_time_interval": timedelta(hours=1)}, {}, "`ModelCheckpoint(train_time_interval=…)` writes"),
    "validations": (
        {},
        {"val_check_interval": 0.5},
        "ModelCheckpoint` beside `Trainer(val_check_interval=0.5)` writes",
    ),
    "batches": ({"monitor": "val_loss"}, {"val_check_interval": 2}, "beside `Trainer(val_check_interval=2)` writes"),
    "over epochs": ({}, {"val_check_interval": 4, "check_val_every_n_epoch": None}, "val_check_interval=4)` writes"),
    "only the last": ({"every_n_train_steps": 4, "save_top_k": 0, "save_last": True}, {}, "every_n_train_steps=4"),
    "accumulated steps": ({"every_n_train_steps": 2}, {"accumulate_grad_batches": 2}, "every_n_train_steps=2"),
}
AT_THE_END: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epochs": ({}, {}),
    "a metric": ({"monitor": "val_loss"}, {}),
    "steps of epochs": ({"every_n_train_steps": BATCHES}, {}),
    "steps of two epochs": ({"every_n_train_steps": 2 * BATCHES}, {}),
    "more steps than there are": ({"every_n_train_steps": 1000}, {}),
    "validations at the end of epochs": ({}, {"val_check_interval": BATCHES}),
    "validations after two epochs": ({}, {"val_check_interval": 2 * BATCHES, "check_val_every_n_epoch": None}),
    "the end of epochs by request": ({"save_on_train_epoch_end": True}, {"val_check_interval": 0.5}),
    "no validation": ({}, {"val_check_interval": 0.5, "limit_val_batches": 0}),
    "nothing": ({"save_top_k": 0, "every_n_train_steps": 4}, {}),
    "accumulated steps": ({"every_n_train_steps": BATCHES // 2}, {"accumulate_grad_batches": 2}),
    "manual steps": ({"every_n_train_steps": BATCHES}, {"net": ManualNet}),
    "a trial": ({"every_n_train_steps": 4}, {"fast_dev_run": 5}),
}


@pytest.mark.parametrize("way", WITHIN)
def test_checkpoints_within_an_epoch_are_told(way: str, saver: Callable[..., ModelCheckpoint]) -> None:
    arguments, options, reason = WITHIN[way]
    (message,) = messages([ExactResume(), saver(**arguments)], **options)
    assert reason in message and "a training loader does not save its position: give it `state_dict`" in message
    assert messages([ExactResume(), saver(**arguments)], PositionLoader, **options) == []


@pytest.mark.parametrize("way", AT_THE_END)
def test_checkpoints_at_the_end_of_epochs_are_exact(way: str, saver: Callable[..., ModelCheckpoint]) -> None:
    arguments, options = AT_THE_END[way]
    assert messages([ExactResume(), saver(**arguments)], **options) == []


def test_other_callbacks(saver: Callable[..., ModelCheckpoint]) -> None:
    average, by_steps = WeightAveraging(EMA(0.9)), saver(every_n_train_steps=3)
    assert messages([average, by_steps]) == [], "who has no ExactResume has not asked for it"
    assert messages([ExactResume()]) == []
    assert messages([ExactResume(), GradientAccumulation(2), by_steps]) == [], "the last step of each epoch"
    assert len(messages([ExactResume(), saver(), saver(every_n_train_steps=4)])) == 1


def test_a_loader_without_a_length(saver: Callable[..., ModelCheckpoint]) -> None:
    (message,) = messages([ExactResume(), saver(every_n_train_steps=BATCHES)], stream)
    assert "save its position" in message and "no length" in message and "`__len__`" in message


def test_a_resumed_run_says_only_what_it_is_itself(saver: Callable[..., ModelCheckpoint], tmp_path: Path) -> None:
    file = tmp_path / "epoch.ckpt"
    fit([ExactResume(), At(file)], shuffling, max_epochs=1, val_check_interval=1.0)
    assert messages([ExactResume(), saver(every_n_train_steps=4)], path=file) == []


class At(Callback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_end(self, trainer: Any, pl_module: Net) -> None:
        trainer.save_checkpoint(self.file)
