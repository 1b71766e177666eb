"""Ask the ``EarlyStopping`` of Lightning whether it has asked the Trainer to stop."""

from __future__ import annotations

from lightning_optim.runtime.lightning import EarlyStopping


def requested_stop(callback: EarlyStopping) -> bool:
    """Return True if Lightning's callback has asked the Trainer to stop.

    Before Lightning 2.6 the callback keeps no reason: a threshold that was met in the very first epoch goes unnoticed.
    """
    if hasattr(callback, "stopping_reason_message"):
        return callback.stopping_reason_message is not None
    return callback.stopped_epoch > 0 or callback.wait_count >= callback.patience
