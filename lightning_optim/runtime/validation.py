"""One more validation within a fit, of which nothing is seen but its metrics."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lightning_optim.runtime.lightning import Trainer, isolate_rng
from lightning_optim.runtime.patching import patched


def validate(trainer: Trainer, run: Callable[[], Any] | None = None) -> dict[str, Tensor]:
    """The metrics of a validation with the weights that the module holds now.

    The module's own hooks run; callbacks and loggers hear nothing of it, nothing is saved, and metrics, progress, the
    random state and the module's modes are afterwards as before.

    Args:
        trainer: A Trainer within ``fit``.
        run: Runs the validation loop. Default: Lightning's own, whatever was put in its place.

    Returns:
        What the validation logged, by name. Empty if there are no validation data.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    with isolate_rng(), _quiet(trainer), _staged(trainer):
        (run or (lambda: type(loop).run(loop)))()
        return dict(trainer.callback_metrics)


@contextlib.contextmanager
def _quiet(trainer: Trainer) -> Iterator[None]:
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    callbacks, loggers, progress = trainer.callbacks, trainer.loggers, copy.deepcopy(loop.batch_progress)
    metrics = {
        name: dict(getattr(connector, name))
        for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    }
    trainer.callbacks, trainer.loggers = [], []
    for name in metrics:
        setattr(connector, name, {})
    try:
        # The module may save in a hook of its own. It will do so in the validation that is seen, with callbacks' state.
        with patched(trainer, "save_checkpoint", lambda *args, **kwargs: None):
            yield
    finally:
        trainer.callbacks, trainer.loggers, loop.batch_progress = callbacks, loggers, progress
        for name, values in metrics.items():
            setattr(connector, name, values)


@contextlib.contextmanager
def _staged(trainer: Trainer) -> Iterator[None]:
    """Lightning takes the running loop, and so where a logged value goes, from the stage."""
    stage, connector = trainer.state.stage, trainer._logger_connector
    first, hook = connector._first_loop_iter, trainer.lightning_module._current_fx_name
    trainer.validating = True
    connector._first_loop_iter = None
    try:
        yield
    finally:
        trainer.state.stage = stage
        connector._first_loop_iter = first
        trainer.lightning_module._current_fx_name = hook
