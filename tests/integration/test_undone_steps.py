"""Test that a step that is tried and undone leaves no trace in any callback's state."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_optim.runtime.capture import RunState, capture, restore_
from tests.harness import models
from tests.harness.cells import Cell
from tests.harness.models import Batches
from tests.integration.entry_fits import TENSOR_ENTRIES, KeepsHistory, differences, fit
from tests.lightning import Callback, LightningModule, Trainer
from tests.registry import Entry

CELL = Cell("automatic", "32-true", "single", "1")


class BatchesTwice(LightningModule):
    """Trait: load each batch twice: for a trial, and for the step that counts."""

    def train_dataloader(self: Any) -> Batches:
        batches = super().train_dataloader().batches
        return Batches([batch for batch in batches for _ in range(2)])


class UndoTrials(Callback):
    """Undo every other step."""

    state: RunState

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            self.state = capture(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % 2 == 0:
            assert restore_(trainer, self.state) == []


# A window of micro-batches is undone as a whole: tests/runtime/test_capture.py.
@pytest.mark.parametrize("entry", [e for e in TENSOR_ENTRIES if not e.accumulates], ids=lambda entry: entry.name)
def test_trial_steps_leave_no_trace(entry: Entry) -> None:
    length = {"max_steps": CELL.batches * entry.epochs, "val_check_interval": 1.0}  # a schedule sees the same length
    expected = fit(entry, CELL, KeepsHistory, **length)
    tried = fit(entry, CELL, BatchesTwice, KeepsHistory, extra=(UndoTrials(),), **length)
    assert differences(tried.module.states, expected.module.states) == []
    assert differences(tried.outcome.raw, expected.outcome.raw) == []
    assert differences(models.full_weights(tried.module), models.full_weights(expected.module)) == []
    assert tried.module.seen == expected.module.seen and tried.module.validations == expected.module.validations
