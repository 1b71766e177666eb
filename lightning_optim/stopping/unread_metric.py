"""Say why a fit ended without a value of the metric by which it should have stopped."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_optim.base.suggestions import nearest, shown
from lightning_optim.runtime.lightning import Trainer


def why_unread(missing: Sequence[str], trainer: Trainer) -> str:
    """Return the reason why no value was read in a fit, and what to do, as sentences that follow a colon.

    Args:
        missing: Metrics that the last check did not find; empty if there was no check.
        trainer: The Trainer, at the end of the fit.
    """
    if missing:
        logged = sorted(trainer.callback_metrics)
        return (
            f"{shown(missing)} was never logged{nearest(missing[0], logged) or '.'} Log it in `validation_step`; logged"
            f" metrics: {shown(logged)}."
        )
    if not trainer.enable_validation:
        return (
            "no validation ran. Give the Trainer validation data and the module a `validation_step`, with"
            " `limit_val_batches` above 0, or monitor a metric of training with `check_on_train_epoch_end=True`."
        )
    return (
        "the fit ended before its first validation. It is due by"
        f" `Trainer(val_check_interval={trainer.val_check_interval},"
        f" check_val_every_n_epoch={trainer.check_val_every_n_epoch})`: choose less, or train longer."
    )
