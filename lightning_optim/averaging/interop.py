"""Checkpoints of Lightning's own averaging: what it writes is read, and what it reads is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.averaging.averages import LAWA, Average
from lightning_optim.averaging.shadow import Shadow
from lightning_optim.averaging.sources import plain_name


def add_for_lightning(checkpoint: dict[str, Any], shadow: Shadow) -> None:
    """Add the two entries from which Lightning's ``WeightAveraging`` resumes: all raw weights, and its counter.

    The raw tensors are those in our own state, so that the file grows by what is not averaged only. A sharded model has
    neither: Lightning's class refuses it.
    """
    saved, raw = checkpoint.get("state_dict", {}), shadow.raw()
    if any(isinstance(value, DTensor) for value in raw.values()):
        return
    by_plain_name = {plain_name(name): value for name, value in raw.items()}
    checkpoint["current_model_state"] = {
        name: by_plain_name.get(plain_name(name), value) for name, value in saved.items()
    }
    checkpoint["averaging_state"] = {"n_averaged": torch.tensor(shadow.updates)}


def from_lightning(checkpoint: dict[str, Any], average: Average) -> dict[str, Any] | None:
    """The state of a shadow for a checkpoint in which there is none of this average.

    Lightning's ``WeightAveraging`` puts the average into ``state_dict``, and the raw weights beside. So does an average
    of ours of another kind: then the raw weights are taken, and this average starts anew.

    Args:
        checkpoint: What was read.
        average: Which kind goes on.

    Returns:
        A state without counters: :func:`with_counters` fills them in, when the steps of each optimizer are known.
    """
    raw = checkpoint.get("current_model_state")
    if raw is None:
        return None
    ours = any("counters" in own for own in checkpoint.get("callbacks", {}).values() if isinstance(own, dict))
    known = not ours and not isinstance(average, LAWA)  # of which Lightning has no like
    updates = _updates(checkpoint.get("averaging_state", {})) if known else 0
    return {"counters": [], "raw": raw, "averaged": {}, "updates_of_lightning": updates}


def with_counters(loaded: dict[str, Any], steps: list[int]) -> dict[str, Any]:
    """A loaded state whose counters are known; Lightning counts updates, and neither steps nor optimizers."""
    updates = loaded.get("updates_of_lightning", 0)
    if not updates:
        return loaded
    counters = [{"updates": updates, "first": max(0, step - updates + 1), "last": step} for step in steps]
    return {**loaded, "counters": counters}


def _updates(averaging_state: dict[str, Any]) -> int:
    count = averaging_state.get("n_averaged", 0)
    return int(count.item() if isinstance(count, Tensor) else count)
