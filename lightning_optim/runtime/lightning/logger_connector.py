"""Read and set what ``self.log`` has gathered in a run, and the metrics that callbacks and loggers see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_optim.runtime.lightning import Trainer, modules
from lightning_optim.runtime.lightning.loops import logging_at_last_step
from lightning_optim.runtime.lightning.private_names import read_private, write_private
from lightning_optim.runtime.patching import patched

SHOWN = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
"""Dictionaries of metrics for callbacks, loggers and the progress bar; checkpoints hold them under these names."""


def connector(trainer: Trainer) -> Any:
    """Return the object in which Lightning keeps what a run has logged."""
    return read_private(trainer, "_logger_connector")


def logs_in_this_step(trainer: Trainer) -> bool:
    """Return True if this batch is one at which values are logged (``Trainer(log_every_n_steps=…)``)."""
    return connector(trainer).should_update_logs


# ---- metrics ---------------------------------------------------------------------------------------------------------


def shown_metrics(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Return the live dictionaries of metrics that callbacks, loggers and the progress bar see."""
    return {name: read_private(connector(trainer), name) for name in SHOWN}


def set_shown_metrics(trainer: Trainer, metrics: Mapping[str, dict[str, Any]]) -> None:
    """Replace the dictionaries that :func:`shown_metrics` returns by these."""
    for name in SHOWN:
        write_private(connector(trainer), name, metrics[name])


def show_to_callbacks(trainer: Trainer, metrics: Mapping[str, Any]) -> None:
    """Add metrics to ``trainer.callback_metrics``."""
    read_private(connector(trainer), "_callback_metrics").update(metrics)


@contextlib.contextmanager
def logging_beside_validation(trainer: Trainer, more: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Context manager: a validation logs what ``more()`` returns beside its own metrics, when it has all of them."""
    log = connector(trainer).log_eval_end_metrics

    def log_both(metrics: Mapping[str, Any]) -> None:
        log({**metrics, **more()})

    with patched(connector(trainer), "log_eval_end_metrics", log_both):
        yield


# ---- values that are half gathered -----------------------------------------------------------------------------------


def results(trainer: Trainer) -> Any:
    """Return the values that training has logged in this epoch, by hook and name, each with its way of reduction."""
    return read_private(trainer.fit_loop.epoch_loop, "_results")


def results_of_loop(trainer: Trainer) -> Any:
    """Return the values that the running loop has logged, also a validation loop; ``None`` where none can be logged."""
    return read_private(trainer, "_results")


def last_value(result: Any) -> Any:
    """Return the value that was logged last under one name of :func:`results`; ``None`` if nothing was logged."""
    return read_private(result, "_forward_cache")


def set_last_value(result: Any, value: Any) -> None:
    """Set the value that :func:`last_value` returns."""
    write_private(result, "_forward_cache", value)


def log_position(trainer: Trainer) -> tuple[str | None, bool | None]:
    """Return the hook that logged last, and whether the epoch is in its first batch (``None``: between epochs).

    By these Lightning decides whether a value is added to those before it, or is the first of a new epoch.
    """
    return read_private(connector(trainer), "_current_fx"), read_private(connector(trainer), "_first_loop_iter")


def set_log_position(trainer: Trainer, hook: str | None, in_first_batch: bool | None) -> None:
    """Set the position that :func:`log_position` returns."""
    write_private(connector(trainer), "_current_fx", hook)
    write_private(connector(trainer), "_first_loop_iter", in_first_batch)


@contextlib.contextmanager
def keep_logging_state(trainer: Trainer) -> Iterator[None]:
    """Context manager: metrics that are seen, the running hook and where ``self.log`` goes on are put back after it."""
    shown, position = shown_metrics(trainer), log_position(trainer)
    hook = modules.running_hook(trainer.lightning_module)
    set_shown_metrics(trainer, {name: dict(metrics) for name, metrics in shown.items()})
    try:
        yield
    finally:
        set_shown_metrics(trainer, shown)
        set_log_position(trainer, *position)
        modules.set_running_hook(trainer.lightning_module, hook)


@contextlib.contextmanager
def logging_nowhere(trainer: Trainer) -> Iterator[None]:
    """Context manager: what a training step logs is gathered apart, and dropped."""
    kind = type(results(trainer))
    with patched(trainer.fit_loop.epoch_loop, "_results", kind(training=True)):
        yield


# ---- the ends of a batch and an epoch --------------------------------------------------------------------------------


def end_batch(trainer: Trainer) -> None:
    """Show and log the values of a training batch, as Lightning does when ``on_train_batch_end`` was called."""
    connector(trainer).on_batch_end()
    connector(trainer).update_train_step_metrics()


def show_epoch(trainer: Trainer) -> None:
    """Show the values of a training epoch to callbacks, as Lightning does after ``on_train_epoch_end``."""
    connector(trainer).on_epoch_end()


def log_epoch(trainer: Trainer) -> None:
    """Log the values of a training epoch, as Lightning does after schedulers were stepped, and begin a new one."""
    with logging_at_last_step(trainer):
        connector(trainer).update_train_epoch_metrics()
