"""The same callback objects in a second fit: as if they were new."""

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
def test_second_fit_is_as_the_first(entry: Entry) -> None:
    """The first fit is another one, with one optimizer and other windows: nothing of it could pass for the second's."""
    cell = Cell(choice_for(entry, "automatic", "manual", "two"), "32-true", "single", "4short")
    other = Cell("automatic", "32-true", "single", "1")
    callbacks = entry.all_callbacks(cell)
    fit(entry, other, callbacks=callbacks, max_epochs=1)
    again = fit(entry, cell, callbacks=callbacks)
    assert_same(again, reference_fit(entry, cell))
    assert not differences(states(again.callbacks), reference_fit(entry, cell).states)


@each_entry
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
def test_a_second_fit_of_one_trainer_goes_on(entry: Entry) -> None:
    """A finished Trainer that is asked to fit again has nothing to do, and leaves the module as it is."""
    fitted = fit(entry)
    before = models.full_weights(fitted.module)
    fitted.trainer.fit(fitted.module)
    assert not differences(models.full_weights(fitted.module), before)


@each_slot
def test_two_trainers_at_once_do_not_meet(entry: Entry) -> None:
    """A fit within another fit, as a search for hyper-parameters may do."""
    inner: list[Any] = []

    class Nesting:
        def on_train_epoch_start(self: Any) -> None:
            if not inner:
                inner.append(fit(entry))

    outer = fit(entry, CELL, Nesting)
    assert_same(inner[0], reference_fit(entry))
    assert_same(outer, reference_fit(entry))


def test_the_second_fit_would_show_what_is_left_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = BY_NAME["stop"]
    callbacks = entry.all_callbacks(CELL)
    fresh = fit(entry, callbacks=callbacks)
    # On the class: what a callback itself overrides runs beside the reset of its class.
    monkeypatch.setattr(type(callbacks[0]), "reset", lambda callback: None)
    assert fit(entry, callbacks=callbacks).outcome.seen != fresh.outcome.seen
