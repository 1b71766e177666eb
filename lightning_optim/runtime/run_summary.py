"""Say at the start of a fit what is on and where it acts, and at its end what was done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from lightning_optim.runtime.lightning import ModelSummary, Trainer, rank_zero_warn
from lightning_optim.runtime.lightning.packages import package_of
from lightning_optim.runtime.order import SessionCallback, in_order

_MOST_LINES = 8


class RunSummary:
    """Log a few lines at the start of a fit, and one at its end, on rank zero.

    Each callback describes itself: :meth:`OptimCallback.describe_step`, :meth:`OptimCallback.describe_run` and
    :meth:`OptimCallback.report`. The lines go to the logger of Lightning's model summary, and are off where that is off
    (``enable_model_summary=False``, ``barebones=True``), or if any of the callbacks has ``summary=False``.

    Args:
        trainer: The Trainer of the fit.
        callbacks: The callbacks of this package in it.
    """

    def __init__(self, trainer: Trainer, callbacks: list[SessionCallback]) -> None:
        self._trainer, self._callbacks = trainer, callbacks
        self._said_start = False

    def start(self) -> None:
        """Log what is on. Called at ``on_train_start``, when the length of the run and the weights are known."""
        if self._is_on() and (lines := start_lines(self._trainer, in_order(self._callbacks, self._trainer))):
            self._said_start = True
            self._log("\n".join(lines))

    def end(self) -> None:
        """Log what was done. Called at ``on_fit_end``, when the module holds the weights that it keeps."""
        if parts := self._reports():
            self._log(" · ".join(parts))

    def interrupted(self) -> None:
        """Log what was done until a user interrupted the fit. Called at ``on_exception``."""
        if self._said_start:
            self._log(" · ".join(["interrupted: the module holds its raw weights", *self._reports()]))

    def _reports(self) -> list[str]:
        """Return what each callback reports; nothing of a fit that had nothing left to train."""
        callbacks = self._by_rank() if self._said_start else []
        return [text for callback in callbacks if (text := _text(callback, callback.report))]

    def _is_on(self) -> bool:
        shows_model = any(isinstance(callback, ModelSummary) for callback in self._trainer.callbacks)
        return shows_model and self._trainer.is_global_zero and all(one.summary for one in self._callbacks)

    def _by_rank(self) -> list[SessionCallback]:
        """Return the callbacks that may write the final weights first, then the others."""
        last = float("inf")
        return sorted(
            in_order(self._callbacks, self._trainer), key=lambda one: last if one.final_rank is None else one.final_rank
        )

    def _log(self, text: str) -> None:
        logging.getLogger(f"{package_of(self._trainer)}.callbacks.model_summary").info(text)


def start_lines(trainer: Trainer, callbacks: Sequence[SessionCallback]) -> list[str]:
    """Return a line for each optimizer, with what happens at each of its steps, and a line for each rule of the run."""
    steps = []
    for index, optimizer in enumerate(trainer.optimizers):
        described = [_text(callback, callback.describe_step, index) or ("", "") for callback in callbacks]
        chain = [before for before, _ in described if before] + [after for _, after in described if after]
        if chain:
            count = sum(len(group["params"]) for group in optimizer.param_groups)
            steps.append(f"optimizer {index} ({type(optimizer).__name__}, {tensors(count)}): {' → '.join(chain)}")
    rules = [rule for callback in callbacks if (rule := _text(callback, callback.describe_run))]
    if len(steps) + len(rules) > _MOST_LINES:
        rules = [" · ".join(rules)] if rules else []
    if (more := len(steps) + len(rules) - _MOST_LINES) > 0:
        kept = len(steps) - more - 1
        steps = [*steps[:kept], f"… and {len(steps) - kept} more optimizers"]
    return steps + rules


def _text(callback: SessionCallback, describe: Callable[..., Any], *args: Any) -> Any:
    """Return what a callback says of itself; if that fails, warn: no fit may end because of a line that is logged."""
    try:
        return describe(*args)
    except Exception as error:
        method = getattr(describe, "__name__", "report")
        rank_zero_warn(f"{type(callback).__name__}.{method} raised {type(error).__name__}: {error}")
        return None


def tensors(count: int) -> str:
    """Return a number of tensors as text, such as "1 tensor".

    Example::

        >>> tensors(1), tensors(1204)
        ('1 tensor', '1,204 tensors')
    """
    return f"{count:,} tensor{'' if count == 1 else 's'}"
