"""A fit that fails: the module holds raw weights, the exception's files resume, the best is at hand."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_optim import EarlyStopping
from lightning_optim.resume.exact_resume import ExactResume
from tests.harness import models
from tests.harness.cells import Cell
from tests.integration.entry_fits import (
    CELL,
    Fitted,
    KeepsHistory,
    choice_for,
    differences,
    each_entry,
    fit,
    prepare,
    reference_fit,
)
from tests.integration.installed import installed
from tests.registry import BY_NAME, Entry


class Failing:
    """Raises in a hook, at the third validation or in the batch before it; keeps the weights that trained until
    then."""

    hook, error, call = "validation_step", ZeroDivisionError, 3

    def __init__(self: Any, *args: Any) -> None:
        super().__init__(*args)  # type: ignore[call-arg]
        self.calls, self.kept = 0, {}
        original = getattr(self, self.hook)

        def perhaps(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.call:
                raise self.error
            return original(*arguments)

        setattr(self, self.hook, perhaps)

    def on_train_batch_end(self: Any, *_: Any) -> None:
        self.kept = models.full_weights(self)


class FailingToTrain(Failing):
    hook, call = "training_step", 9


class FailingToEnd(Failing):
    hook = "on_validation_end"


class Interrupted(Failing):
    error = KeyboardInterrupt


def failed(entry: Entry, cell: Cell, trait: Any, **options: Any) -> Fitted:
    fitted = prepare(entry, cell, trait, KeepsHistory, **options)
    # Lightning answers an interrupt by ending the process.
    with pytest.raises(SystemExit if trait is Interrupted else ZeroDivisionError):
        fitted.trainer.fit(fitted.module)
    return fitted


@each_entry
@pytest.mark.parametrize("trait", [Failing, FailingToTrain, FailingToEnd, Interrupted])
def test_module_holds_raw_weights(entry: Entry, trait: Any) -> None:
    cell = Cell(choice_for(entry, "automatic", "manual", "two"), "32-true", "single", "4short")
    fitted = failed(entry, cell, trait)
    assert not differences(models.full_weights(fitted.module), fitted.module.kept)
    assert not differences(installed(fitted), installed_without_callbacks(cell, trait, entry.epochs))


@functools.cache
def installed_without_callbacks(cell: Cell, trait: Any, epochs: int) -> dict[str, Any]:
    return installed(failed(BY_NAME["plain"], cell, trait, callbacks=[], max_epochs=epochs))


@each_entry
@pytest.mark.parametrize("trait", [Failing, Interrupted])
def test_files_of_an_exception_resume(entry: Entry, trait: Any, tmp_path: Path) -> None:
    by_lightning = OnExceptionCheckpoint(tmp_path, "exception")
    saver = ModelCheckpoint(tmp_path, "saved", save_on_exception=True, every_n_epochs=100)
    extra = (ExactResume(), by_lightning, saver)
    failed(entry, CELL, trait, extra=extra, enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 2, paths
    for path in paths:
        assert_resumed(fit(entry, CELL, KeepsHistory, extra=(ExactResume(),), ckpt_path=path), reference_fit(entry))


def assert_resumed(resumed: Fitted, other: Fitted) -> None:
    one, two = resumed.outcome, other.outcome
    for what in ("final", "raw", "validations", "seen"):
        assert not differences(getattr(one, what), getattr(two, what)), what
    assert not differences(resumed.module.momentum, other.module.momentum)


@each_entry
def test_file_of_an_exception_holds_the_evaluated_weights(entry: Entry, tmp_path: Path) -> None:
    """The file is as consistent as any other: `state_dict` is what a validation would see."""
    hand = evaluated_by_hand(entry)
    fitted = failed(
        entry, CELL, FailingToEnd, extra=(OnExceptionCheckpoint(tmp_path, "it"),), enable_checkpointing=True
    )
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]
    assert not differences(saved, hand)
    assert entry.name != "ema" or differences(saved, fitted.module.kept), "nothing to tell apart"


def evaluated_by_hand(entry: Entry) -> dict[str, Any]:
    """What the third validation of a run that goes well sees."""
    seen: list[dict[str, Any]] = []

    class Watching:
        def on_validation_start(self: Any) -> None:
            seen.append(models.full_weights(self))

    fit(entry, CELL, Watching, KeepsHistory)
    return seen[2]


def test_best_is_at_hand_after_an_exception(tmp_path: Path) -> None:
    cell = Cell("automatic", "32-true", "single", "1")
    for dirpath in (None, str(tmp_path)):
        stopping = EarlyStopping("val_score", dirpath=dirpath)
        entry = BY_NAME["stop"]
        fitted = failed(entry, cell, Failing, callbacks=[stopping])
        other = copy.deepcopy(fitted.module.cpu())
        stopping.restore_best_(other)
        best = fit(entry, cell, max_epochs=1).outcome.final  # the second of two validations is the better one
        assert not differences(models.full_weights(other), best)
        assert differences(models.full_weights(other), fitted.module.kept)
        stopping.restore_best_(fitted.module)
        assert not differences(models.full_weights(fitted.module), best)
