"""Refuse a ``monitor`` of ``EarlyStopping`` that is neither a metric's name nor a criterion, with the line to write."""

from __future__ import annotations

import numbers
from typing import Any

from lightning_optim.base.metric_names import mode_of
from lightning_optim.base.policy import belongs_to
from lightning_optim.stopping.combined_criteria import AllOf
from lightning_optim.stopping.criteria import DEFAULT_PATIENCE, Criterion, Plateau
from lightning_optim.stopping.improvement import check_monitor


def check_early_stopping_monitor(
    monitor: Any, min_delta: Any = 0.0, patience: Any = DEFAULT_PATIENCE, mode: Any = "min"
) -> None:
    """Raise for several metrics, for a list of criteria and for swapped arguments.

    Args:
        monitor: The argument ``monitor``.
        min_delta: The argument that comes after it.
        patience: The patience that each of several metrics would have.
        mode: The mode of all metrics, or a list of modes.

    Raises:
        ValueError: If ``monitor`` is neither a metric's name nor a criterion, or if ``min_delta`` is a name.

    Example::

        >>> check_early_stopping_monitor(["loss", "error"])
        Traceback (most recent call last):
            ...
        ValueError: `monitor` must be one metric's name or a criterion, got ['loss', 'error']: for several metrics write
        EarlyStopping(AllOf([Plateau('loss'), Plateau('error')]), best_by='loss'), which stops when none of them
        improves; AnyOf stops as soon as one of them does not.
    """
    if isinstance(monitor, Criterion):
        return
    if isinstance(monitor, list | tuple | set | dict) and len(monitor) > 0:
        told = _for_several(monitor, patience, mode)
        raise ValueError(f"`monitor` must be one metric's name or a criterion, got {monitor!r}{told}")
    # An integer in the place of the metric's name is the patience, which is third in Lightning's order.
    check_monitor(monitor, "EarlyStopping", "patience" if _is_integer(monitor) else "min_delta", min_delta)


def _for_several(monitor: Any, patience: Any, mode: Any) -> str:
    """Return the end of the message for several metrics or criteria: what to write."""
    modes = list(monitor.values()) if isinstance(monitor, dict) else mode
    if not isinstance(modes, list | tuple) or len(modes) != len(monitor) or not set(modes) <= {"min", "max"}:
        modes = [(mode_of(one) if isinstance(one, str) else None) or mode for one in monitor]
    parts = [_criterion(one, patience, its_mode) for one, its_mode in zip(monitor, modes, strict=True)]
    criteria = [part for part in parts if part is not None]
    if len(criteria) < len(parts):
        return belongs_to(list(monitor), Criterion)
    if len(criteria) == 1:
        (one,) = monitor
        max_told = ", mode='max'" if isinstance(one, str) and modes[0] == "max" else ""
        return f": write EarlyStopping({one!r}{max_told})"
    names = AllOf(criteria).monitors
    best_by = f", best_by={names[0]!r}" if len(names) > 1 else ""
    return (
        f": for several metrics write EarlyStopping(AllOf({criteria}){best_by}), which stops when none of them"
        " improves; AnyOf stops as soon as one of them does not."
    )


def _criterion(one: Any, patience: Any, mode: Any) -> Criterion | None:
    if isinstance(one, Criterion):
        return one
    try:
        chosen = {} if patience == DEFAULT_PATIENCE else {"patience": patience}
        return Plateau(one, **chosen, mode="max" if mode == "max" else "min")
    except ValueError:
        return None


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
