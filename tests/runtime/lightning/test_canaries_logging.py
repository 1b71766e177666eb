"""The private names of logged values mean what `runtime/lightning/logger_connector.py` takes them for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim.runtime.lightning import logger_connector
from tests.lightning import Trainer
from tests.runtime.lightning.canaries import At, Model, Written, canary, fit, numbers


@canary("_logger_connector")
def test_when_values_are_logged() -> None:
    logger = Written()
    # Asked before the step, as Lightning does when it logs after it.
    now = At("on_train_batch_start", logger_connector.logs_in_this_step)
    fit(Model(on_step=True), now, training=numbers(5), log_every_n_steps=2, logger=logger)
    assert now.seen == [False, True, False, True, False]
    assert logger.steps_of("value") == [1, 3]


@canary("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
def test_metrics_that_are_shown() -> None:
    def swap(trainer: Trainer) -> Any:
        before = logger_connector.shown_metrics(trainer)
        kept = [float(metrics["value"]) for metrics in before.values()]
        logger_connector.set_shown_metrics(trainer, {name: {"other": torch.ones(())} for name in before})
        after = [trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics]
        assert all("other" in metrics for metrics in after)
        logger_connector.show_to_callbacks(trainer, {"more": torch.ones(())})
        return kept, "more" in trainer.callback_metrics, "more" in trainer.logged_metrics

    seen = At("on_train_epoch_end", swap)
    fit(Model(prog_bar=True), seen, logger=Written(), training=numbers(3))
    assert seen.seen == [([2.0, 2.0, 2.0], True, False)]


def _epoch_mean(position: tuple[str | None, bool | None] | None) -> float:
    """Return the mean that is logged of 0, 1, 2, 3 if the position is set after the second batch."""

    def put(trainer: Trainer) -> None:
        if trainer.global_step == 2 and position is not None:
            logger_connector.set_log_position(trainer, *position)

    trainer = fit(Model(on_step=False, on_epoch=True), At("on_train_batch_start", put))
    return float(trainer.callback_metrics["value"])


@canary("_current_fx", "_first_loop_iter")
def test_where_log_goes_on() -> None:
    position = At("on_train_batch_end", logger_connector.log_position)
    between = At("on_train_epoch_start", logger_connector.log_position)
    fit(Model(), position, between, max_epochs=2)
    # The hook that logged last, and whether it is the epoch's first batch.
    assert position.seen == [("training_step", True), *[("training_step", False)] * 3] * 2
    assert between.seen == [(None, None)] * 2
    assert _epoch_mean(None) == 1.5
    assert _epoch_mean((None, True)) == 2.5  # as in a first batch, of a hook that has not logged: it begins anew
    assert _epoch_mean(("training_step", True)) == 1.5
    assert _epoch_mean((None, False)) == 1.5


@canary("_results")
def test_results() -> None:
    def look(trainer: Trainer) -> Any:
        result = logger_connector.results(trainer)["training_step.value"]
        return float(result.value), float(result.cumulated_batch_size), result.meta.name, result.has_reset

    def elsewhere(trainer: Trainer) -> None:
        with logger_connector.logging_nowhere(trainer):
            trainer.lightning_module.log("value", 100.0, on_step=False, on_epoch=True)
            trainer.lightning_module.log("nowhere", 1.0)

    look_at, log = At("on_train_epoch_end", look), At("on_train_batch_end", elsewhere)
    trainer = fit(Model(on_step=False, on_epoch=True), log, look_at)
    assert look_at.seen == [(6.0, 4.0, "value", False)]
    assert float(trainer.callback_metrics["value"]) == 1.5 and "nowhere" not in trainer.callback_metrics


@canary("_forward_cache")
def test_last_values() -> None:
    def replace(trainer: Trainer) -> float:
        result = logger_connector.results(trainer)["training_step.value"]
        found = float(logger_connector.last_value(result))
        logger_connector.set_last_value(result, torch.tensor(100.0 + found))
        return found

    last = At("on_train_batch_end", replace)
    values = At("on_train_batch_end", lambda trainer: float(trainer.callback_metrics["value_step"]))
    fit(Model(on_step=True, on_epoch=True), last, values)
    assert last.seen == [0.0, 1.0, 2.0, 3.0] and values.seen == [100.0, 101.0, 102.0, 103.0]


def test_more_beside_a_validation() -> None:
    logger, contexts = Written(), []

    def enter(trainer: Trainer) -> None:
        contexts.append(logger_connector.logging_beside_validation(trainer, lambda: {"beside": torch.ones(())}))
        contexts[-1].__enter__()

    leave = At("on_validation_end", lambda trainer: contexts.pop().__exit__(None, None, None))
    fit(Model(), At("on_validation_start", enter), leave, validation=numbers(), logger=logger)
    assert [metrics for metrics, _ in logger.metrics if "beside" in metrics and "seen_epoch" in metrics]
    assert not contexts


def test_logging_goes_on_as_before() -> None:
    def disturb(trainer: Trainer) -> None:
        with pytest.raises(ZeroDivisionError), logger_connector.keep_logging_state(trainer):
            logger_connector.show_to_callbacks(trainer, {"disturbed": torch.ones(())})
            logger_connector.set_log_position(trainer, None, None)
            trainer.lightning_module._current_fx_name = "training_step"
            _ = 1 / 0

    undisturbed, disturbed = Written(), Written()
    fit(Model(on_step=True, on_epoch=True), logger=undisturbed, max_epochs=2)
    trainer = fit(Model(on_step=True, on_epoch=True), At("on_train_batch_end", disturb), logger=disturbed, max_epochs=2)
    assert disturbed.metrics == undisturbed.metrics and "disturbed" not in trainer.callback_metrics
