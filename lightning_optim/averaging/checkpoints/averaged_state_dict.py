"""Read one of several averages out of a checkpoint."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_optim.averaging.checkpoints import reading
from lightning_optim.averaging.checkpoints.average_checkpoints import PathLike
from lightning_optim.averaging.checkpoints.running_mean import StateDict, ties

_COUNTS = ("updates", "first", "last")
_LONGEST_KEY = 4000  # no callback has a longer key, and on one Python's parser could run out of stack


@dataclass(frozen=True)
class SavedAverage:
    """Describe an average in a checkpoint.

    Attributes:
        kind: The policy with its numbers, such as ``EMA(0.999)``; of a file without them its class.
        name: The callback's ``name=``, if it has one.
        evaluated: True if ``state_dict`` is this average, and the callback's state has the raw weights.
        updates: Number of updates, of several optimizers the largest.
        first: Optimizer step of the first update.
        last: Optimizer step of the last update.
        tensors: The averaged tensors in the callback's state.
    """

    kind: str
    name: str | None
    evaluated: bool
    updates: int
    first: int
    last: int
    tensors: dict[str, Tensor]


def averages_in(checkpoint: Mapping[str, Any]) -> list[SavedAverage]:
    """Return the averages of a loaded checkpoint that have been updated."""
    return [
        found for key, state in callback_states(checkpoint).items() if (found := _found(str(key), state)) is not None
    ]


def callback_states(checkpoint: Mapping[str, Any]) -> Mapping[Any, Any]:
    """Return the states of callbacks in a loaded checkpoint, by key."""
    callbacks = checkpoint.get("callbacks")
    return callbacks if isinstance(callbacks, Mapping) else {}


def _found(key: str, state: Any) -> SavedAverage | None:
    """Return the average in a callback's state; ``None`` without updates, or if the callback keeps no average."""
    try:
        counters = [{name: int(counter[name]) for name in _COUNTS} for counter in state["counters"] if counter]
        is_evaluated, averaged = bool(state["raw"]), dict(state["averaged"])
    except Exception:  # any error, since the states of other callbacks can be anything
        return None
    if not counters or not all(isinstance(tensor, Tensor) for tensor in averaged.values()):
        return None
    identity = _identity(key)
    policy = state.get("policy")
    return SavedAverage(
        policy[:200] if isinstance(policy, str) else str(identity.get("average", "")).removesuffix("()"),
        identity.get("name"),
        is_evaluated,
        max(counter["updates"] for counter in counters),
        min(counter["first"] for counter in counters),
        max(counter["last"] for counter in counters),
        averaged,
    )


def _identity(key: str) -> dict[str, Any]:
    _, brace, rest = key.partition("{")
    if len(key) > _LONGEST_KEY:
        return {}
    try:
        return dict(ast.literal_eval(brace + rest))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return {}


def averaged_state_dict(path: PathLike, name: str | None = None, *, weights_only: bool = True) -> StateDict:
    """Return the weights of one of the averages in a checkpoint, as a ``state_dict`` for the module.

    Args:
        path: Path of a checkpoint of a run with :class:`WeightAveraging` callbacks.
        name: The ``name=`` of the callback. ``None``: the evaluated average, which is the checkpoint's ``state_dict``,
            or the only average if none was evaluated.
        weights_only: If True, read only tensors and plain values. With False a checkpoint of unknown origin can run any
            code.

    Returns:
        The ``state_dict`` of the checkpoint with the averaged tensors in it, in the dtypes of the weights.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If the checkpoint has no such average, or is the folder of a distributed checkpoint.

    Example::

        >>> import os, tempfile, torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_optim import EMA, WeightAveraging
        >>> slow = WeightAveraging(EMA(0.999))
        >>> fast = WeightAveraging(EMA(0.9), evaluate=False, name="fast")
        >>> trainer = Trainer(max_steps=3, callbacks=[slow, fast], barebones=True)
        >>> trainer.fit(model := BoringModel())
        >>> trainer.save_checkpoint(path := os.path.join(tempfile.mkdtemp(), "one.ckpt"))
        >>> model.load_state_dict(averaged_state_dict(path, "fast"))
        <All keys matched successfully>
    """
    if os.path.isdir(path):
        raise ValueError(
            f"{os.fspath(path)} is a folder, a distributed checkpoint, whose averages can only be read by resuming from"
            " it. Its evaluated weights are returned by `average_checkpoints([path])`."
        )
    checkpoint = reading.load_checkpoint(path, weights_only)
    found = averages_in(checkpoint)
    chosen = [one for one in found if one.name == name] if name else [one for one in found if one.evaluated] or found
    if len(chosen) != 1 or not isinstance(checkpoint.get("state_dict"), Mapping):
        there = [f"{one.kind} name={one.name!r}" for one in found]
        raise ValueError(f"{os.fspath(path)} does not hold exactly one average with `name={name!r}`; it has {there}")
    state: StateDict = dict(checkpoint["state_dict"])
    if not chosen[0].evaluated:
        tied = ties(state)
        for key, value in state.items():
            if (average := chosen[0].tensors.get(tied.get(key, key))) is not None:
                state[key] = average.to(value.dtype)
    return state
