"""Read when a ``ModelCheckpoint`` writes."""

from __future__ import annotations

from datetime import timedelta

from lightning_optim.runtime.lightning import ModelCheckpoint, Trainer
from lightning_optim.runtime.lightning.private_names import read_private


def step_interval(callback: ModelCheckpoint) -> int:
    """Return the number of steps after which it writes again; 0 if it does not count steps."""
    return read_private(callback, "_every_n_train_steps")


def time_interval(callback: ModelCheckpoint) -> timedelta | None:
    """Return the time after which it writes again; ``None`` if it does not use the clock."""
    return read_private(callback, "_train_time_interval")


def writes_after_validations(callback: ModelCheckpoint, trainer: Trainer) -> bool:
    """Return True if it writes after validations instead of at the end of epochs, in a fit whose data are set up."""
    return bool(callback.every_n_epochs) and not read_private(callback, "_should_save_on_train_epoch_end")(trainer)
