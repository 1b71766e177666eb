"""The same callback objects in a second fit act as if they were new."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import models
from tests.harness.cells import Cell
from tests.integration.entry_fits import (
    CELL,
    assert_same,
    choice_for,
    differences,
    each_entry,
    each_slot,
    fit,
    prepare,
    reference_fit,
    states,
)
from tests.registry import BY_NAME, Entry


@each_entry
def test_second_fit_equals_a_first_one(entry: Entry) -> None:
    """The first fit has one optimizer and other windows, so that nothing left of it could pass for the second fit's.

    An entry with a bound for each optimizer has them all in the first fit too.
    """
    cell = Cell(choice_for(entry, "automatic", "manual", "two"), "32-true", "single", "4short")
    other = Cell("two" if entry.name == "clip_by_optimizer" else "automatic", "32-true", "single", "1")
    callbacks = entry.all_callbacks(cell)
    fit(entry, other, callbacks=callbacks, max_epochs=1)
    again = fit(entry, cell, callbacks=callbacks)
    assert_same(again, reference_fit(entry, cell))
    assert not differences(states(again.callbacks), reference_fit(entry, cell).states)


@each_slot
def test_fit_after_a_failed_fit(entry: Entry) -> None:
    callbacks = entry.all_callbacks(CELL)
    failing = prepare(entry, CELL, callbacks=callbacks)
    failing.module.on_validation_start = _fail
    with pytest.raises(ZeroDivisionError):
        failing.trainer.fit(failing.module)
    assert_same(fit(entry, callbacks=callbacks), reference_fit(entry))


def _fail() -> None:
    raise ZeroDivisionError


@each_slot
def test_a_second_fit_of_a_finished_trainer_changes_nothing(entry: Entry) -> None:
    """A finished Trainer has nothing left to do, and leaves the module as it is."""
    fitted = fit(entry)
    before = models.full_weights(fitted.module)
    fitted.trainer.fit(fitted.module)
    assert not differences(models.full_weights(fitted.module), before)


@each_slot
def test_a_fit_within_a_fit(entry: Entry) -> None:
    """Another Trainer may fit while one is fitting, as in a search for hyper-parameters."""
    inner: list[Any] = []

    class Nesting:
        def on_train_epoch_start(self: Any) -> None:
            if not inner:
                inner.append(fit(entry))

    outer = fit(entry, CELL, Nesting)
    assert_same(inner[0], reference_fit(entry))
    assert_same(outer, reference_fit(entry))


def test_a_second_fit_without_a_reset_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = BY_NAME["stop"]
    callbacks = entry.all_callbacks(CELL)
    fresh = fit(entry, callbacks=callbacks)
    # On the class: a method set on the object would run beside the reset of its class.
    monkeypatch.setattr(type(callbacks[0]), "reset", lambda callback: None)
    assert fit(entry, callbacks=callbacks).outcome.seen != fresh.outcome.seen
