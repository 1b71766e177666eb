"""Describe the content of a checkpoint for ``lightning-optim inspect``: its weights, and the averages in it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_optim.averaging.checkpoints import reading
from lightning_optim.averaging.checkpoints.average_checkpoints import PathLike
from lightning_optim.averaging.checkpoints.averaged_state_dict import averages_in, callback_states
from lightning_optim.averaging.checkpoints.provenance import Provenance, read_provenance


def describe(
    path: PathLike,
    weights_only: bool = True,
    key: str | None = None,
    entries: Callable[[Mapping[Any, Any]], tuple[str, str] | None] = lambda checkpoint: None,
) -> Iterator[str]:
    """Yield the lines that ``lightning-optim inspect`` prints.

    Args:
        path: The checkpoint.
        weights_only: If True, read only tensors and plain values.
        key: Name of the weights.
        entries: Function that returns of a checkpoint with entries of other parts of the package a line, and the kind
            of its weights ("" if it does not know it).
    """
    path = os.fspath(path)
    checkpoint = reading.load_checkpoint(path, weights_only)
    if os.path.isdir(path):
        weights = reading.weights_in(path, weights_only, key)
    else:
        weights = reading.weights_of(checkpoint, path, key)
    provenance = read_provenance(path, checkpoint)
    if "pytorch-lightning_version" not in checkpoint:
        yield _describe_plain(path, reading.weights_key(checkpoint, path, key), weights, provenance)
        yield from provenance.lines() if provenance else ()
        return
    kind = "a distributed checkpoint" if os.path.isdir(path) else "a checkpoint"
    is_bare = "callbacks" not in checkpoint  # such a checkpoint does not say if its weights are averaged
    if is_bare:
        kind = f"{kind} with weights only"
    yield f"{path}: {kind} of Lightning {checkpoint['pytorch-lightning_version']}"
    of_last = f", those of {provenance.sources[-1].file}" if provenance else ""
    yield f"epoch {checkpoint.get('epoch', 'unknown')}, global step {checkpoint.get('global_step', 'unknown')}{of_last}"
    line, kind = entries(checkpoint) or ("", "")
    if line:
        yield line
    found = averages_in(checkpoint)
    evaluated = next((one for one in found if one.evaluated), None)
    theirs = isinstance(checkpoint.get("averaging_state"), Mapping) and not _holds_ours(checkpoint)
    if key:
        what = "weights"
    elif evaluated or theirs or provenance:
        what = _of_provenance(provenance) if provenance else "averaged weights"
    elif kind:
        what = kind
    else:
        what = "unknown whether raw or averaged weights" if is_bare else "raw weights"
    yield f"{key or reading.STATE_DICT}: {what}, {_size(weights)}"
    yield from provenance.lines() if provenance else ()
    if theirs:
        count = int(checkpoint["averaging_state"].get("n_averaged", 0))
        yield f"an average of Lightning's WeightAveraging: {count} updates; raw weights in current_model_state"
    for one in found:
        name = "" if one.name is None else f" name={one.name!r}"
        where = "in state_dict, raw weights beside" if one.evaluated else "in the callback's state"
        yield f"{one.kind}{name}: {one.updates} updates, the first at step {one.first}, the last at {one.last}; {where}"


def _of_provenance(provenance: Provenance) -> str:
    return "averaged weights" if provenance.is_mean else "the weights of one file"


def _describe_plain(path: str, key: str | None, weights: Mapping[Any, Any], provenance: Provenance | None) -> str:
    if not reading.holds_tensors(weights):
        raise ValueError(f"{path} holds no weights" + (f" under `{key}`" if key else ""))
    what = _of_provenance(provenance) if provenance else "weights"
    return f"{path}: {what}" + (f" under `{key}`" if key else "") + f", {_size(weights)}"


def _holds_ours(checkpoint: Mapping[str, Any]) -> bool:
    return any("counters" in state for state in callback_states(checkpoint).values() if isinstance(state, dict))


def _size(weights: Mapping[str, Any]) -> str:
    tensors = [value for _, value in reading.leaves(weights) if isinstance(value, Tensor)]
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in tensors)
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    plural = "" if len(tensors) == 1 else "s"
    return f"{sum(value.numel() for value in tensors):,} numbers in {len(tensors)} tensor{plural} ({kinds})"
