"""The private names of Lightning's loops mean what `runtime/lightning/loops.py` takes them for."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.runtime.lightning import loops
from tests.lightning import Callback, Trainer
from tests.runtime.lightning.canaries import At, Model, Written, canary, fit, numbers


@canary("_batches_that_stepped")
def test_logger_step() -> None:
    logger, model = Written(), Model(on_step=True, on_epoch=True)
    steps = At("on_train_batch_end", loops.logger_step)
    closes = At("on_train_batch_end", lambda trainer: not loops.window_is_open(trainer))
    fit(model, steps, closes, training=numbers(5), accumulate_grad_batches=2, logger=logger, max_epochs=2)
    found = [step for step, closed in zip(steps.seen, closes.seen, strict=True) if closed]
    assert logger.steps_of("value_step") == found == [0, 1, 2, 3, 4, 5]
    assert logger.steps_of("value_epoch") == [2, 5]

    logger = Written()

    def log(trainer: Trainer) -> None:
        with loops.logging_at_last_step(trainer):
            trainer._logger_connector.log_metrics({"at": torch.ones(())})

    fit(Model(), At("on_train_epoch_end", log), logger=logger)
    assert logger.steps_of("at") == [3]


@canary("_loaded_from_state_dict")
def test_is_resuming() -> None:
    asks = At("on_train_batch_start", loops.is_resuming)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "first.ckpt")
        fit(Model(), asks).save_checkpoint(path)
        resumed = At("on_train_batch_start", loops.is_resuming)
        fit(Model(), resumed, resume=path, max_epochs=3)
    assert asks.seen == [False] * 4
    assert resumed.seen == [True] * 4 + [False] * 4


@canary("_skip_next_val")
def test_skip_next_validation() -> None:
    validated = At("on_validation_end", lambda trainer: trainer.global_step)
    skip = At("on_train_batch_end", lambda trainer: loops.skip_next_validation(trainer, trainer.global_step == 2))
    fit(Model(), validated, skip, validation=numbers(), val_check_interval=1)
    assert validated.seen == [1, 3, 4]


class Twice(Model):
    """Evaluates the loss twice in a step, and reports the first."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().training_step(batch, batch_idx) * 0.0 + self.calls

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def twice() -> Any:
            loss = optimizer_closure()
            with loops.keep_result(optimizer_closure):
                optimizer_closure()
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, twice)


class Reported(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


@canary("_result")
def test_keep_result() -> None:
    reported = Reported()
    fit(Twice(), reported, training=numbers(2))
    assert reported.losses == [1.0, 3.0]


def test_keep_result_of_a_users_function() -> None:
    calls = []
    with loops.keep_result(lambda: calls.append(1)):
        pass
    assert not calls


class Same(Callback):
    """Compares the public counters with what Lightning decides."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at, self.seen = stop_at, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.stop_at is not None and trainer.global_step >= self.stop_at:
            trainer.should_stop = True
        loop = trainer.fit_loop.epoch_loop
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        theirs = (loop._num_ready_batches_reached(), loop._should_accumulate(), loop._is_training_done or stops)
        ours = (loops.is_last_batch(trainer), loops.window_is_open(trainer), loops.ends_epoch(trainer))
        assert ours == theirs, (ours, theirs)
        self.seen.append(ours)


@pytest.mark.parametrize(
    ("options", "stop_at"),
    [
        ({}, None),
        ({"accumulate_grad_batches": 3}, None),
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, None),
        ({"max_steps": 3, "max_epochs": -1}, None),
        ({"min_steps": 3}, 1),
        ({"min_epochs": 2, "max_epochs": 3}, 1),
        ({"max_epochs": 3}, 6),
    ],
)
def test_public_counters_decide_as_lightning(options: dict[str, Any], stop_at: int | None) -> None:
    same = Same(stop_at)
    fit(Model(), same, training=numbers(5), **options)
    assert {True, False} <= {ours[2] for ours in same.seen}
