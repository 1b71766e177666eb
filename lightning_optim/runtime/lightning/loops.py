"""Read where a running fit is, and change what its loops do next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning_optim.runtime.lightning import Trainer
from lightning_optim.runtime.lightning.packages import stand_in
from lightning_optim.runtime.lightning.private_names import read_private, write_private

_AbstractClosure = stand_in("AbstractClosure", "loops.optimization.closure")


def is_resuming(trainer: Trainer) -> bool:
    """Return True from the moment when a checkpoint's progress was loaded until the first epoch after it has ended."""
    return read_private(trainer.fit_loop, "_loaded_from_state_dict")  # public only from Lightning 2.6 on


def is_last_batch(trainer: Trainer) -> bool:
    """Return True if the training batch that was fetched last is the epoch's last."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch or progress.current.ready == trainer.num_training_batches


def window_is_open(trainer: Trainer) -> bool:
    """Return True if batches of ``accumulate_grad_batches`` were processed, and their step was not taken yet."""
    count = trainer.fit_loop.epoch_loop.batch_progress.current
    epoch_is_done = count.processed == count.ready and is_last_batch(trainer)
    steps_at_end = epoch_is_done and not trainer.strategy.handles_gradient_accumulation
    return count.processed % trainer.accumulate_grad_batches != 0 and not steps_at_end


def ends_epoch(trainer: Trainer) -> bool:
    """Return True if Lightning ends the epoch after this batch: the last one, or the last of a run that stops."""
    loop = trainer.fit_loop
    if is_last_batch(trainer) or (loop.max_steps != -1 and trainer.global_step >= loop.max_steps):
        return True
    epochs_are_done = not loop.min_epochs or loop.epoch_progress.current.processed >= loop.min_epochs
    steps_are_done = not loop.min_steps or trainer.global_step >= loop.min_steps
    return trainer.should_stop and epochs_are_done and steps_are_done


def logger_step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs: the number of batches that ended a step, as it counts them."""
    return read_private(trainer.fit_loop.epoch_loop, "_batches_that_stepped")


@contextlib.contextmanager
def logging_at_last_step(trainer: Trainer) -> Iterator[None]:
    """Context manager: values are logged at the step of the last batch, as those of an epoch's end are."""
    loop, step = trainer.fit_loop.epoch_loop, logger_step(trainer)
    write_private(loop, "_batches_that_stepped", step - 1)
    try:
        yield
    finally:
        write_private(loop, "_batches_that_stepped", step)


def skip_next_validation(trainer: Trainer, skip: bool) -> None:
    """Leave out the validation that is due after this batch, or let it run."""
    write_private(trainer.fit_loop.epoch_loop, "_skip_next_val", skip)


@contextlib.contextmanager
def keep_result(closure: Callable[[], Any]) -> Iterator[None]:
    """Context manager: keep the result of the optimizer's closure, which Lightning reports, while it is called again.

    A function that a user has put around Lightning's closure has no result, and nothing is kept.
    """
    result = read_private(closure, "_result") if isinstance(closure, _AbstractClosure) else None
    yield
    if result is not None:
        write_private(closure, "_result", result)
