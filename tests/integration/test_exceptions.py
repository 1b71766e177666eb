"""A fit that raises: the module holds raw weights, checkpoints of the exception resume, the best can be restored."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

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
    each_entry_by,
    fit,
    prepare,
    reference_fit,
)
from tests.integration.installed import installed
from tests.lightning import ModelCheckpoint, OnExceptionCheckpoint, supported
from tests.registry import BY_NAME, Entry


class Failing:
    """Trait: raise in a hook, at the third validation or in the batch before it; keep the raw weights until then."""

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
    # Lightning ends the process after an interrupt.
    with pytest.raises(SystemExit if trait is Interrupted else ZeroDivisionError):
        fitted.trainer.fit(fitted.module)
    return fitted


@each_entry_by("trait", Failing, FailingToTrain, FailingToEnd, Interrupted)
def test_module_holds_raw_weights(entry: Entry, trait: Any) -> None:
    cell = Cell(choice_for(entry, "automatic", "manual", "two"), "32-true", "single", "4short")
    fitted = failed(entry, cell, trait)
    assert not differences(models.full_weights(fitted.module), fitted.module.kept)
    assert not differences(installed(fitted), installed_without_callbacks(cell, trait, entry.epochs))


@functools.cache
def installed_without_callbacks(cell: Cell, trait: Any, epochs: int) -> dict[str, Any]:
    return installed(failed(BY_NAME["plain"], cell, trait, callbacks=[], max_epochs=epochs))


@each_entry_by("trait", Failing, Interrupted)
def test_checkpoints_of_an_exception_resume(entry: Entry, trait: Any, tmp_path: Path) -> None:
    by_lightning = OnExceptionCheckpoint(tmp_path, "exception")
    on_exception = supported(ModelCheckpoint, save_on_exception=True)
    savers = [ModelCheckpoint(tmp_path, "saved", every_n_epochs=100, **on_exception)] if on_exception else []
    extra = (ExactResume(), by_lightning, *savers)
    failed(entry, CELL, trait, extra=extra, enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 1 + len(savers), paths
    for path in paths:
        assert_resumed(fit(entry, CELL, KeepsHistory, extra=(ExactResume(),), ckpt_path=path), reference_fit(entry))


def assert_resumed(resumed: Fitted, other: Fitted) -> None:
    one, two = resumed.outcome, other.outcome
    for what in ("final", "raw", "validations", "seen"):
        assert not differences(getattr(one, what), getattr(two, what)), what
    assert not differences(resumed.module.momentum, other.module.momentum)


@each_entry
def test_checkpoint_of_an_exception_holds_the_evaluated_weights(entry: Entry, tmp_path: Path) -> None:
    """As in any other checkpoint, `state_dict` holds the weights that a validation would use."""
    expected = weights_of_third_validation(entry)
    fitted = failed(
        entry, CELL, FailingToEnd, extra=(OnExceptionCheckpoint(tmp_path, "it"),), enable_checkpointing=True
    )
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]
    assert not differences(saved, expected)
    assert entry.name != "ema" or differences(saved, fitted.module.kept), "nothing to tell apart"


def weights_of_third_validation(entry: Entry) -> dict[str, Any]:
    """Return the weights that the third validation of an undisturbed run uses."""
    seen: list[dict[str, Any]] = []

    class Watching:
        def on_validation_start(self: Any) -> None:
            seen.append(models.full_weights(self))

    fit(entry, CELL, Watching, KeepsHistory)
    return seen[2]


def test_best_weights_can_be_restored_after_an_exception(tmp_path: Path) -> None:
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
