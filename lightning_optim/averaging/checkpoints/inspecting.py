"""What is in a checkpoint: which weights, of which average, after how many updates."""

from __future__ import annotations

import ast
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_optim.averaging.checkpoints import reading
from lightning_optim.averaging.checkpoints.average_checkpoints import Path, StateDict, ties

_COUNTS = ("updates", "first", "last")
_LONGEST_KEY = 4000  # a longer one is no callback's, and Python's parser would spend its stack on it


@dataclass(frozen=True)
class Found:
    """An average in a checkpoint.

    Attributes:
        key: Under which the checkpoint holds the callback's state.
        kind: The policy, such as ``EMA()``.
        name: The callback's ``name=``, if it has one.
        evaluated: Whether ``state_dict`` holds this average, and the callback's state the raw weights.
        updates: The number of updates; with several optimizers the largest.
        first: The optimizer step of the first update.
        last: The optimizer step of the last.
        tensors: The averaged tensors that are in the callback's state.
    """

    key: str
    kind: str
    name: str | None
    evaluated: bool
    updates: int
    first: int
    last: int
    tensors: dict[str, Tensor]


def averages_in(checkpoint: Mapping[str, Any]) -> list[Found]:
    """The averages of a loaded checkpoint that have started."""
    return [found for key, state in _callbacks(checkpoint).items() if (found := _found(str(key), state)) is not None]


def _callbacks(checkpoint: Mapping[str, Any]) -> Mapping[Any, Any]:
    callbacks = checkpoint.get("callbacks")
    return callbacks if isinstance(callbacks, Mapping) else {}


def _found(key: str, state: Any) -> Found | None:
    """Return the average in a callback's state; ``None`` if it is another callback's, or there were no updates."""
    try:
        counters = [{name: int(counter[name]) for name in _COUNTS} for counter in state["counters"] if counter]
        is_evaluated, averaged = bool(state["raw"]), dict(state["averaged"])
    except Exception:  # of any kind: another callback's state may be anything
        return None
    if not counters or not all(isinstance(tensor, Tensor) for tensor in averaged.values()):
        return None
    identity = _identity(key)
    return Found(
        key,
        str(identity.get("average", "")),
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


def averaged_state_dict(path: Path, name: str | None = None, *, weights_only: bool = True) -> StateDict:
    """The weights of one of several averages in a checkpoint, as a ``state_dict`` for the module.

    Args:
        path: A checkpoint file of a run with :class:`WeightAveraging`.
        name: The callback's ``name=``. ``None``: the average that was evaluated, which is what ``state_dict`` holds,
            else the only one.
        weights_only: Read nothing but tensors and plain values.

    Raises:
        ValueError: If there is no such average in the file, or it is a folder.
    """
    if os.path.isdir(path):
        raise ValueError(
            f"{os.fspath(path)} is a folder, a distributed checkpoint, whose averages only a run that resumes from it"
            " reads; the evaluated weights are what `average_checkpoints([path])` returns"
        )
    checkpoint = reading.load_checkpoint(path, weights_only)
    found = averages_in(checkpoint)
    chosen = [one for one in found if one.name == name] if name else [one for one in found if one.evaluated] or found
    if len(chosen) != 1 or not isinstance(checkpoint.get("state_dict"), Mapping):
        there = [f"{one.kind} name={one.name!r}" for one in found]
        raise ValueError(f"{os.fspath(path)} holds no single average of `name={name!r}`; there are {there}")
    state: StateDict = dict(checkpoint["state_dict"])
    if not chosen[0].evaluated:
        tied = ties(state)
        for key, value in state.items():
            if (average := chosen[0].tensors.get(tied.get(key, key))) is not None:
                state[key] = average.to(value.dtype)
    return state


def describe(path: Path, weights_only: bool = True, key: str | None = None) -> Iterator[str]:
    """What ``lightning-optim inspect`` prints, line by line."""
    path = os.fspath(path)
    checkpoint = reading.load_checkpoint(path, weights_only)
    if os.path.isdir(path):
        weights = reading.weights_in(path, weights_only, key)
    else:
        weights = reading.weights_of(checkpoint, path, key)
    if "pytorch-lightning_version" not in checkpoint:
        yield from _describe_plain(path, reading.weights_key(checkpoint, path, key), weights)
        return
    kind = "a distributed checkpoint" if os.path.isdir(path) else "a checkpoint"
    if "callbacks" not in checkpoint:
        kind = f"{kind} with weights only"
    yield f"{path}: {kind} of Lightning {checkpoint['pytorch-lightning_version']}"
    yield f"epoch {checkpoint.get('epoch', 'unknown')}, global step {checkpoint.get('global_step', 'unknown')}"
    found = averages_in(checkpoint)
    evaluated = next((one for one in found if one.evaluated), None)
    theirs = isinstance(checkpoint.get("averaging_state"), Mapping) and not _holds_ours(checkpoint)
    what = "averaged" if evaluated or theirs else "unknown whether raw or averaged" if _bare(checkpoint) else "raw"
    yield f"{key}: weights, {_size(weights)}" if key else f"state_dict: {what} weights, {_size(weights)}"
    if theirs:
        count = int(checkpoint["averaging_state"].get("n_averaged", 0))
        yield f"an average of Lightning's WeightAveraging: {count} updates; raw weights in current_model_state"
    for one in found:
        name = "" if one.name is None else f" name={one.name!r}"
        where = "in state_dict, raw weights beside" if one.evaluated else "in the callback's state"
        yield f"{one.kind}{name}: {one.updates} updates, the first at step {one.first}, the last at {one.last}; {where}"


def _describe_plain(path: str, key: str | None, weights: Mapping[Any, Any]) -> Iterator[str]:
    if not reading.holds_tensors(weights):
        raise ValueError(f"{path} holds no weights" + (f" under `{key}`" if key else ""))
    yield f"{path}: weights" + (f" under `{key}`" if key else "") + f", {_size(weights)}"


def _holds_ours(checkpoint: Mapping[str, Any]) -> bool:
    return any("counters" in state for state in _callbacks(checkpoint).values() if isinstance(state, dict))


def _bare(checkpoint: Mapping[str, Any]) -> bool:
    """Weights-only files say nothing of averages."""
    return "callbacks" not in checkpoint


def _size(weights: Mapping[str, Any]) -> str:
    tensors = [value for _, value in reading.leaves(weights) if isinstance(value, Tensor)]
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in tensors)
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    return f"{sum(value.numel() for value in tensors):,} numbers in {len(tensors)} tensors ({kinds})"
