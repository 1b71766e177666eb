"""Run one more validation during a fit, without a trace but the metrics that are returned."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lightning_optim.runtime.lightning import Trainer, logger_connector
from lightning_optim.runtime.patching import patched
from lightning_optim.runtime.random_state import isolated_random_state


def validate(trainer: Trainer, run: Callable[[], Any] | None = None) -> dict[str, Tensor]:
    """Validate with the weights that the module holds now, and return the metrics.

    For other weights than the evaluated average, call it within ``session.without_average()``. The hooks of the module
    are called; those of callbacks are not, nothing is sent to loggers, and nothing is saved. Metrics, progress, random
    state and the module's train and eval modes are restored afterwards.

    Args:
        trainer: A Trainer in ``fit``.
        run: Function that runs the validation loop. Default: that of Lightning, even if it was patched.

    Returns:
        The logged metrics by name; an empty dictionary if there is no validation set.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    with isolated_random_state(), _without_callbacks_and_loggers(trainer), _in_validation_stage(trainer):
        (run or (lambda: type(loop).run(loop)))()
        return dict(trainer.callback_metrics)


@contextlib.contextmanager
def _without_callbacks_and_loggers(trainer: Trainer) -> Iterator[None]:
    """Context manager: no callback or logger is called, nothing is saved; the validation's progress is restored."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    callbacks, loggers, progress = trainer.callbacks, trainer.loggers, copy.deepcopy(loop.batch_progress)
    trainer.callbacks, trainer.loggers = [], []
    try:
        # A hook of the module may save a checkpoint. It will do so again in the validation that callbacks see.
        with patched(trainer, "save_checkpoint", lambda *args, **kwargs: None):
            yield
    finally:
        trainer.callbacks, trainer.loggers, loop.batch_progress = callbacks, loggers, progress


@contextlib.contextmanager
def _in_validation_stage(trainer: Trainer) -> Iterator[None]:
    """Context manager: the Trainer is validating, and has no metrics; ``log`` sends values to the validation loop."""
    stage = trainer.state.stage
    with logger_connector.keep_logging_state(trainer):
        trainer.validating = True
        logger_connector.set_log_position(trainer, None, None)
        logger_connector.set_shown_metrics(trainer, {name: {} for name in logger_connector.SHOWN})
        try:
            yield
        finally:
            trainer.state.stage = stage
