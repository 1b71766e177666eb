"""The learning-rate finder and `fast_dev_run`: their trial steps leave no trace in a fit."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_optim import OptimCallback
from tests.harness import models
from tests.integration.entry_fits import (
    CELL,
    Fitted,
    RestartedLoader,
    differences,
    each_entry,
    each_slot,
    fit,
    prepare,
    reference_fit,
    states,
)
from tests.integration.installed import installed
from tests.lightning import LearningRateFinder, Trainer, Tuner, _LRCallback
from tests.registry import BY_NAME, Entry

STEPS = 5
TRIAL: dict[str, Any] = {"min_lr": 1e-3, "max_lr": 1.0, "early_stop_threshold": None, "update_attr": False}


class WithLearningRate(RestartedLoader):
    """Trait: a learning rate to find; validations of trials are not recorded."""

    def __init__(self: Any, *args: Any) -> None:
        super().__init__(*args)  # type: ignore[call-arg]
        self.lr = self.cell.lr

    def on_validation_end(self: Any) -> None:
        if not any(isinstance(callback, _LRCallback) for callback in self.trainer.callbacks):
            super().on_validation_end()  # type: ignore[misc]


def assert_same_weights(fitted: Fitted, alone: Fitted) -> None:
    one, other = fitted.outcome, alone.outcome
    for what in ("raw", "final", "validations"):
        assert not differences(getattr(one, what), getattr(other, what)), what


@each_slot
def test_tuner_changes_nothing(entry: Entry, tmp_path: Any) -> None:
    fitted = prepare(entry, CELL, WithLearningRate, default_root_dir=tmp_path)
    weights, before = models.full_weights(fitted.module), states(fitted.callbacks)
    finder = Tuner(fitted.trainer).lr_find(fitted.module, num_training=STEPS, **TRIAL)
    assert finder is not None
    assert finder.results["lr"][-1] > 10 * finder.results["lr"][0], "nothing was tried"
    assert not differences(models.full_weights(fitted.module), weights)
    assert not differences(states(fitted.callbacks), before)
    assert not differences(installed(fitted), installed_after_a_search(tmp_path, entry.epochs))
    fitted.trainer.fit(fitted.module)
    assert_same_weights(fitted, reference_fit(entry))
    assert not differences(states(fitted.callbacks), reference_fit(entry).states)


def installed_after_a_search(folder: Any, epochs: int) -> dict[str, Any]:
    plain = prepare(BY_NAME["plain"], CELL, WithLearningRate, callbacks=[], default_root_dir=folder, max_epochs=epochs)
    Tuner(plain.trainer).lr_find(plain.module, num_training=STEPS, **TRIAL)
    return installed(plain)


@each_slot
@pytest.mark.parametrize("first", [True, False])
def test_finder_among_the_callbacks(entry: Entry, first: bool, tmp_path: Any) -> None:
    """The finder's trial steps come before the first of the fit, and our callbacks do not count them."""
    finder = LearningRateFinder(num_training_steps=STEPS, **TRIAL)
    callbacks = entry.all_callbacks(CELL)
    chosen = [finder, *callbacks] if first else [*callbacks, finder]
    fitted = fit(entry, CELL, WithLearningRate, callbacks=chosen, default_root_dir=tmp_path)
    assert finder.optimal_lr is not None
    assert_same_weights(fitted, reference_fit(entry))
    assert not differences(states(callbacks), reference_fit(entry).states)


class FindInSecondEpoch(LearningRateFinder):
    """Search when the second epoch begins, as Lightning's documentation shows."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1 and self.optimal_lr is None:
            self.lr_find(trainer, pl_module)


class Counting(OptimCallback):
    """Count steps in an attribute that no checkpoint restores."""

    heard = 0

    def on_after_optimizer_step(self, *_: Any) -> None:
        self.heard += 1


@each_entry
def test_finder_in_the_middle(entry: Entry, tmp_path: Any) -> None:
    """The state before the trials is restored from a checkpoint, with the weights of an average that has started."""
    finder, callbacks, counting = (
        FindInSecondEpoch(num_training_steps=STEPS, **TRIAL),
        entry.all_callbacks(CELL),
        Counting(),
    )
    # With a validation at the end of the first epoch, Lightning would try nothing.
    options: dict[str, Any] = {"check_val_every_n_epoch": 2, "val_check_interval": 1.0, "max_epochs": 3}
    alone = fit(entry, CELL, WithLearningRate, **options)
    chosen = [*callbacks, counting, finder]
    fitted = fit(entry, CELL, WithLearningRate, callbacks=chosen, default_root_dir=tmp_path, **options)
    assert finder.optimal_lr is not None
    assert finder.optimal_lr.results["lr"], "nothing was tried"
    assert counting.steps == [counting.heard], "a trial step was heard"
    assert_same_weights(fitted, alone)
    assert not differences(states(callbacks), states(alone.callbacks))


@each_slot
@pytest.mark.filterwarnings("ignore:GradientAccumulation accumulates 4 micro-batches")  # in the fit of one batch
def test_fast_dev_run(entry: Entry, tmp_path: Any) -> None:
    """One batch of training and one of validation, as in a fit of one batch; no best weights are restored."""
    quick = fit(entry, CELL, fast_dev_run=True, default_root_dir=tmp_path)
    one: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "val_check_interval": 1}
    short = fit(entry, CELL, **one)
    assert quick.module.seen == short.module.seen == 1
    assert not differences(models.full_weights(quick.module), short.outcome.final)
    assert all(callback.steps == [1] for callback in quick.ours)
    initial = models.full_weights(prepare(entry).module)
    assert differences(models.full_weights(quick.module), initial)
