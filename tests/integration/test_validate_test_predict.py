"""`validate`, `test` and `predict` use the weights that were validated in the fit, and change no callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import models, regression
from tests.harness.cells import Cell
from tests.integration.entry_fits import (
    CELL,
    Fitted,
    TestsAndPredicts,
    assert_same,
    differences,
    each_entry,
    each_slot,
    fit,
    prepare,
    reference_fit,
    states,
)
from tests.lightning import ModelCheckpoint, supported
from tests.registry import BY_NAME, Entry

VERBS = ("validate", "test", "predict")


def evaluated(fitted: Fitted, verb: str, **options: Any) -> float:
    """Return the loss on the validation data, from the output of `validate`, `test` or `predict`."""
    output = getattr(fitted.trainer, verb)(fitted.module, **options)
    if verb == "predict":
        return float(torch.nn.functional.mse_loss(output[0], regression.validation_batch()[1]))
    return float(output[0]["val_loss" if verb == "validate" else "test_loss"])


@each_slot
def test_before_any_fit(entry: Entry) -> None:
    fitted = prepare(entry, CELL, TestsAndPredicts)
    weights, before = models.full_weights(fitted.module), states(fitted.callbacks)
    plain = prepare(BY_NAME["plain"], CELL, TestsAndPredicts)
    for verb in VERBS:
        assert evaluated(fitted, verb) == evaluated(plain, verb)
    assert not differences(models.full_weights(fitted.module), weights)
    assert not differences(states(fitted.callbacks), before)


@each_entry
def test_after_a_fit(entry: Entry, tmp_path: Path) -> None:
    """The best checkpoint has the score that it had in the fit, in the Trainer that wrote it and in a new one."""
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_on_train_epoch_end=False)
    fitted = fit(entry, CELL, TestsAndPredicts, extra=(best,), enable_checkpointing=True)
    assert best.best_model_score is not None
    assert float(best.best_model_score) in fitted.module.validations
    final, before = models.full_weights(fitted.module), states(fitted.callbacks)
    for verb in VERBS:
        assert evaluated(fitted, verb, ckpt_path="best") == pytest.approx(float(best.best_model_score), rel=1e-6)
    # The raw weights are part of an average's state; after `validate` the module holds those of the checkpoint.
    fitted.module.load_state_dict(final)
    assert not differences(states(fitted.callbacks), before), "evaluating changed what the callbacks remember"
    fresh = prepare(entry, CELL, TestsAndPredicts)
    for verb in VERBS:
        trusted = supported(fresh.trainer.validate, weights_only=False)
        value = evaluated(fresh, verb, ckpt_path=best.best_model_path, **trusted)
        assert value == pytest.approx(float(best.best_model_score), rel=1e-6)
    assert not differences(states(fresh.callbacks), states(prepare(entry).callbacks))


@each_entry
def test_without_a_path_after_a_fit(entry: Entry) -> None:
    """The module ends with the best validated weights, and these are tested, without any swap."""
    fitted = fit(entry, CELL, TestsAndPredicts)
    final = models.full_weights(fitted.module)
    plain = prepare(BY_NAME["plain"], CELL, TestsAndPredicts)
    plain.module.load_state_dict(fitted.module.state_dict())
    for verb in VERBS:
        assert evaluated(fitted, verb) == evaluated(plain, verb)
    assert not differences(models.full_weights(fitted.module), final)


@each_slot
def test_evaluating_between_two_fits(entry: Entry) -> None:
    callbacks = entry.all_callbacks(CELL)
    fit(entry, callbacks=callbacks, max_epochs=1)
    for verb in VERBS:
        evaluated(prepare(entry, CELL, TestsAndPredicts, callbacks=callbacks), verb)
    assert_same(fit(entry, callbacks=callbacks), reference_fit(entry))


def test_raw_and_averaged_weights_have_different_losses() -> None:
    """Otherwise the tests above could not tell the average from the raw weights."""
    fitted = fit(BY_NAME["ema"], Cell("automatic", "32-true", "single", "1"), TestsAndPredicts)
    raw = prepare(BY_NAME["plain"], CELL, TestsAndPredicts)
    raw.module.load_state_dict(fitted.module.raw)
    assert abs(evaluated(raw, "test") - evaluated(fitted, "test")) > 1e-3
