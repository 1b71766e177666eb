"""Find out at the start of a run that its checkpoints will not resume exactly."""

from __future__ import annotations

import math

from lightning_optim.resume.exactness_checks import loader_doubts
from lightning_optim.runtime.lightning import ModelCheckpoint, Trainer
from lightning_optim.runtime.lightning.checkpoint_times import step_interval, time_interval, writes_after_validations
from lightning_optim.runtime.step import micro_batches, total_steps


def why_inexact(trainer: Trainer) -> str:
    """Return a sentence if a ``ModelCheckpoint`` will write within an epoch that a loader cannot continue; else empty.

    Args:
        trainer: The Trainer of a run that begins, when its data are set up.
    """
    doubts = loader_doubts(trainer)
    reasons = [within_epoch(one, trainer) for one in trainer.callbacks if isinstance(one, ModelCheckpoint)]
    reason = next(filter(None, reasons), "")
    if not doubts or not reason:
        return ""
    return (
        f"A run that is resumed from a checkpoint of this one will not be exact: {reason} writes in the middle of an"
        f" epoch, and {'; '.join(doubts)}. Or write checkpoints at the end of epochs only."
    )


def within_epoch(callback: ModelCheckpoint, trainer: Trainer) -> str:
    """Return the setting by which the callback writes before the end of an epoch, in words; empty if it does not."""
    if callback.save_top_k == 0 and not callback.save_last:
        return ""
    steps, seconds = step_interval(callback), time_interval(callback)
    if steps and _is_within(steps, trainer):
        return f"`ModelCheckpoint(every_n_train_steps={steps})`"
    if seconds is not None:
        return "`ModelCheckpoint(train_time_interval=…)`"
    if writes_after_validations(callback, trainer) and _validates_within(trainer):
        return f"`ModelCheckpoint` beside `Trainer(val_check_interval={trainer.val_check_interval})`"
    return ""


def _is_within(steps: int, trainer: Trainer) -> bool:
    """Return True if some multiple of a number of steps is known to be neither an epoch's end nor that of the run."""
    if not trainer.lightning_module.automatic_optimization:
        return False  # an epoch may have any number of steps: only a resume can tell whether it begins within one
    batches = trainer.num_training_batches
    return steps < total_steps(trainer) and (
        math.isinf(batches) or steps % math.ceil(batches / micro_batches(trainer, 0)) != 0
    )


def _validates_within(trainer: Trainer) -> bool:
    if not trainer.enable_validation or not sum(trainer.num_val_batches):
        return False
    interval, batches = trainer.val_check_batch, trainer.num_training_batches
    if interval is None:  # by the clock
        return True
    if math.isinf(interval):
        return False
    return interval % batches != 0 if trainer.check_val_every_n_epoch is None else interval < batches
