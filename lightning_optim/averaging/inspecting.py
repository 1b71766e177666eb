"""What is in a checkpoint: which weights, of which average, after how many updates."""

from __future__ import annotations

import ast
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_optim.averaging import reading
from lightning_optim.averaging.checkpoints import Path, StateDict, ties


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
    found = []
    for key, state in checkpoint.get("callbacks", {}).items():
        if isinstance(state, dict) and any(counters := [c for c in state.get("counters", []) if c]):
            identity = _identity(key)
            found.append(
                Found(
                    key,
                    identity.get("average", ""),
                    identity.get("name"),
                    bool(state["raw"]),
                    max(count["updates"] for count in counters),
                    min(count["first"] for count in counters),
                    max(count["last"] for count in counters),
                    state["averaged"],
                )
            )
    return found


def _identity(key: str) -> dict[str, Any]:
    _, brace, rest = key.partition("{")
    try:
        return dict(ast.literal_eval(brace + rest))
    except (SyntaxError, ValueError):
        return {}


def averaged_state_dict(path: Path, name: str | None = None, *, weights_only: bool = True) -> StateDict:
    """The weights of one of several averages in a checkpoint, as a ``state_dict`` for the module.

    Args:
        path: A checkpoint file of a run with :class:`WeightAveraging`.
        name: The callback's ``name=``. ``None``: the average that was evaluated, which is what ``state_dict`` holds,
            else the only one.
        weights_only: Read nothing but tensors and plain values.

    Raises:
        ValueError: If there is no such average in the file.
    """
    checkpoint = reading.load_checkpoint(path, weights_only)
    found = averages_in(checkpoint)
    chosen = [one for one in found if one.name == name] if name else [one for one in found if one.evaluated] or found
    if len(chosen) != 1:
        there = [f"{one.kind} name={one.name!r}" for one in found]
        raise ValueError(f"{os.fspath(path)} holds no single average of `name={name!r}`; there are {there}")
    state: StateDict = dict(checkpoint["state_dict"])
    if not chosen[0].evaluated:
        tied = ties(state)
        for key, value in state.items():
            if (average := chosen[0].tensors.get(tied.get(key, key))) is not None:
                state[key] = average.to(value.dtype)
    return state


def describe(path: Path, weights_only: bool = True) -> Iterator[str]:
    """What ``lightning-optim inspect`` prints, line by line."""
    path = os.fspath(path)
    checkpoint = reading.load_checkpoint(path, weights_only)
    is_lightning = "pytorch-lightning_version" in checkpoint
    if not is_lightning:
        weights = reading.weights_in(path, weights_only)
        yield f"{path}: weights, {_size(weights)}"
        return
    kind = "a distributed checkpoint" if os.path.isdir(path) else "a checkpoint"
    if "callbacks" not in checkpoint:
        kind = f"{kind} with weights only"
    yield f"{path}: {kind} of Lightning {checkpoint['pytorch-lightning_version']}"
    yield f"epoch {checkpoint.get('epoch', 'unknown')}, global step {checkpoint.get('global_step', 'unknown')}"
    found = averages_in(checkpoint)
    evaluated = next((one for one in found if one.evaluated), None)
    theirs = "averaging_state" in checkpoint and not _holds_ours(checkpoint)
    what = "averaged" if evaluated or theirs else "unknown whether raw or averaged" if _bare(checkpoint) else "raw"
    yield f"state_dict: {what} weights, {_size(reading.weights_in(path, weights_only))}"
    if theirs:
        count = int(checkpoint["averaging_state"].get("n_averaged", 0))
        yield f"an average of Lightning's WeightAveraging: {count} updates; raw weights in current_model_state"
    for one in found:
        name = "" if one.name is None else f" name={one.name!r}"
        where = "in state_dict, raw weights beside" if one.evaluated else "in the callback's state"
        yield f"{one.kind}{name}: {one.updates} updates, the first at step {one.first}, the last at {one.last}; {where}"


def _holds_ours(checkpoint: Mapping[str, Any]) -> bool:
    return any("counters" in state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict))


def _bare(checkpoint: Mapping[str, Any]) -> bool:
    """Weights-only files say nothing of averages."""
    return "callbacks" not in checkpoint


def _size(weights: Mapping[str, Any]) -> str:
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in tensors)
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    return f"{sum(value.numel() for value in tensors):,} numbers in {len(tensors)} tensors ({kinds})"
