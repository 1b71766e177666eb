"""Say why there is no value of the metric by which a fit should stop, at a check or at the end of the fit."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_optim.base.suggestions import nearest, shown
from lightning_optim.runtime.lightning import Trainer
from lightning_optim.runtime.lightning.modules import is_overridden


def why_missing(missing: Sequence[str], trainer: Trainer, validated: bool) -> str:
    """Return the reason why a check does not find a metric, and what to do, as sentences that follow the metric's name.

    Args:
        missing: Metrics that the check did not find.
        trainer: The Trainer.
        validated: True if a validation has ended in this fit.
    """
    logged = trainer.callback_metrics
    near = nearest(missing[0], logged)
    if validated or near:
        return f"is not logged{near or '.'} {_where_to_log(missing[0])}"
    if not trainer.enable_validation:
        return f"is not there, since no validation runs: {_no_validation(trainer)}"
    return (
        "is not there, since no validation has run yet. It is due by"
        f" {_intervals(trainer)}: pass `check_on_train_epoch_end=False` to read metrics after validations only"
    )


def why_unread(missing: Sequence[str], trainer: Trainer, validated: bool) -> str:
    """Return the reason why no value was read in a fit, and what to do, as sentences that follow a colon.

    Args:
        missing: Metrics that the last check did not find; empty if there was no check.
        trainer: The Trainer, at the end of the fit.
        validated: True if a validation has ended in this fit.
    """
    logged = sorted(trainer.callback_metrics)
    near = nearest(missing[0], logged) if missing else ""
    if missing and (validated or near):
        return (
            f"{shown(missing)} was never logged{near or '.'} {_where_to_log(missing[0])}; logged metrics:"
            f" {shown(logged)}."
        )
    if not trainer.enable_validation:
        return f"no validation ran: {_no_validation(trainer)}."
    return (
        f"the fit ended before its first validation. It is due by {_intervals(trainer)}: choose less, or train longer."
    )


def _where_to_log(metric: str) -> str:
    """Return where a metric of this name can be logged so that it is there when it is read."""
    training = "in `training_step` with `on_epoch=True` and pass `check_on_train_epoch_end=True`"
    if {"train", "training"}.isdisjoint(re.split("[^a-z]+", metric.lower())):
        return f"Log it in `validation_step`, or {training}"
    return f"Log it {training}"


def _no_validation(trainer: Trainer) -> str:
    """Return what to do so that validations run."""
    training = "or monitor a metric of training with `check_on_train_epoch_end=True`"
    if not is_overridden("validation_step", trainer.lightning_module):
        return f"define `validation_step`, {training}"
    if trainer.limit_val_batches == 0:
        return f"set `Trainer(limit_val_batches=…)` above 0, {training}"
    return (
        "pass a validation loader, as in `trainer.fit(model, train_loader, val_dataloaders=val_loader)` or"
        f" `fit_members(…, val_dataloaders=val_loader)`, {training}"
    )


def _intervals(trainer: Trainer) -> str:
    val, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    return f"`Trainer(val_check_interval={val}, check_val_every_n_epoch={epochs})`"
