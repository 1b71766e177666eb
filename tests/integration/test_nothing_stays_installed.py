"""No hook, replaced method or setting stays after a fit or after an error in `setup`."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from lightning_optim import L2, GradientAccumulation, Linear, WeightRegularization
from lightning_optim.runtime.session import Session
from tests.harness import models
from tests.harness.cells import Cell
from tests.integration.entry_fits import (
    CELL,
    assert_same,
    choice_for,
    differences,
    each_entry_by,
    each_slot,
    fit,
    prepare,
    reference_fit,
)
from tests.integration.installed import installed, settings
from tests.lightning import MisconfigurationException
from tests.registry import BY_NAME, Entry


@each_entry_by("precision", "32-true", "16-mixed")
def test_after_a_fit(entry: Entry, precision: Any) -> None:
    cell = Cell(choice_for(entry, "automatic", "manual", "two"), precision, "single", "4short")
    running: dict[str, Any] = {}
    fitted = prepare(entry, cell)
    before = settings(fitted.trainer)
    fitted.module.on_train_epoch_start = lambda: running.update(installed(fitted))
    fitted.trainer.fit(fitted.module)
    del fitted.module.on_train_epoch_start
    plain = installed_without_callbacks(cell, entry.epochs)
    assert not differences(installed(fitted), plain)
    assert settings(fitted.trainer) == before
    assert all(callback.fit is None for callback in fitted.ours)
    assert Session.find(fitted.trainer) is None
    # Within the fit the list is another one, so it shows what is installed.
    assert differences(running, plain)


@functools.cache
def installed_without_callbacks(cell: Cell, epochs: int) -> dict[str, Any]:
    return installed(fit(BY_NAME["plain"], cell, callbacks=[], max_epochs=epochs))


@each_slot
def test_after_a_refusal_in_setup(entry: Entry) -> None:
    """The last callback is refused after the setup of the others; Trainer, module and a new fit are as before."""
    endless = WeightRegularization(L2(Linear(1e-3, 0.0), on="*"), name="endless")
    fitted = prepare(entry, CELL, extra=(endless,), max_epochs=-1)
    weights, before = models.full_weights(fitted.module), settings(fitted.trainer)
    with pytest.raises(MisconfigurationException, match="length of this run is unknown"):
        fitted.trainer.fit(fitted.module)
    assert_untouched(fitted, weights, before)
    again = fit(entry, CELL, callbacks=[callback for callback in fitted.callbacks if callback is not endless])
    assert_same(again, reference_fit(entry))


@each_slot
def test_after_a_refusal_at_the_start_of_training(entry: Entry) -> None:
    """Only the loaded data show that this run has no known length."""
    endless = WeightRegularization(L2(Linear(1e-3, 0.0), on="*"), name="endless")
    fitted = prepare(entry, CELL, extra=(endless,), max_epochs=1000, limit_train_batches=1.0, val_check_interval=1)
    fitted.module.train_dataloader = lambda: iter(models.Model.train_dataloader(fitted.module))
    weights, before = models.full_weights(fitted.module), settings(fitted.trainer)
    with pytest.raises(MisconfigurationException, match="length of this run is unknown"):
        fitted.trainer.fit(fitted.module)
    assert_untouched(fitted, weights, before)


def assert_untouched(fitted: Any, weights: Any, before: Any) -> None:
    assert not differences(models.full_weights(fitted.module), weights)
    assert settings(fitted.trainer) == before
    assert all(callback.fit is None for callback in fitted.ours)
    assert not any("replaced" in name and value for name, value in installed(fitted).items())


def test_a_setting_that_changes_by_epoch_is_undone() -> None:
    """The Trainer gets its own setting back, and not that of the last epoch."""
    fitted = fit(BY_NAME["plain"], CELL, callbacks=[GradientAccumulation({0: 4, 1: 2})])
    assert fitted.trainer.accumulate_grad_batches == 1
