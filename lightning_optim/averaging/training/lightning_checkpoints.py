"""Checkpoints of Lightning's own averaging: what it writes is read, and what it reads is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.averaging.average import Average
from lightning_optim.averaging.lawa import LAWA
from lightning_optim.averaging.training import pruning
from lightning_optim.averaging.training.averaged_weights import AveragedWeights
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.checkpoint_state import edit_before_write
from lightning_optim.runtime.lightning import Strategy, Trainer
from lightning_optim.runtime.order import Slot


def add_for_lightning(checkpoint: dict[str, Any], shadow: AveragedWeights, masks: dict[str, Tensor]) -> None:
    """Add the two entries from which Lightning's ``WeightAveraging`` resumes: all raw weights, and its counter.

    The raw tensors are those in our own state, so that the file grows by what is not averaged only. A sharded model has
    neither: Lightning's class refuses it.

    Args:
        checkpoint: What will be saved.
        shadow: The average that it holds.
        masks: Masks of weights whose pruning is permanent in checkpoints.
    """
    saved, raw = (pruning.permanent(named, masks) for named in (checkpoint.get("state_dict", {}), shadow.raw()))
    if any(isinstance(source.parameter, DTensor) for sources in shadow.sources for source in sources):
        return  # also before the average has started, when there are no raw tensors
    by_plain_name = {plain_name(name): value for name, value in raw.items()}
    checkpoint["current_model_state"] = {
        name: by_plain_name.get(plain_name(name), value) for name, value in saved.items()
    }
    checkpoint["averaging_state"] = {"n_averaged": torch.tensor(shadow.updates)}


def leave_out_as_state_dict(strategy: Strategy) -> None:
    """Let the next checkpoint that is written leave out of the raw weights what it leaves out of ``state_dict``.

    A module that keeps a frozen base out of its files deletes it from ``state_dict`` in its own ``on_save_checkpoint``,
    which comes after that of callbacks.
    """

    def edit(checkpoint: dict[str, Any]) -> None:
        saved, raw = checkpoint.get("state_dict", {}), checkpoint.get("current_model_state", {})
        if saved.keys() < raw.keys():  # not where the module has renamed its weights
            checkpoint["current_model_state"] = {name: raw[name] for name in saved}

    edit_before_write(strategy, edit)


def receiver_of_raw_weights(trainer: Trainer, checkpoint: dict[str, Any]) -> OptimCallback | None:
    """Who takes the raw weights from a checkpoint in which no average of this run has them in a state of its own.

    The average that is evaluated, else the first.
    """
    averages = [cb for cb in trainer.callbacks if isinstance(cb, OptimCallback) and cb.slot is Slot.AVERAGE]
    states = checkpoint.get("callbacks", {})
    if any(states.get(callback.state_key, {}).get("raw") for callback in averages):
        return None
    return next((callback for callback in averages if callback.evaluates), averages[0])


def state_from_other_average(checkpoint: dict[str, Any], average: Average, key: str) -> dict[str, Any] | None:
    """What an average takes over from a checkpoint whose ``state_dict`` holds another one's.

    Lightning's ``WeightAveraging`` puts the average into ``state_dict``, and the raw weights beside. So does another
    average of ours: then the raw weights are taken, and this average starts anew or goes on from its own state.

    Args:
        checkpoint: What was read. If it has a state under the key, the raw weights are added there.
        average: Which kind goes on.
        key: Under which the checkpoint may hold its state.

    Returns:
        A state without counters: :func:`with_counters` fills them in, when the steps of each optimizer are known.
    """
    raw = checkpoint.get("current_model_state")
    if raw is None:
        return None
    if (own := checkpoint.get("callbacks", {}).get(key)) is not None:
        own["raw"] = raw
        return None
    ours = any("counters" in own for own in checkpoint.get("callbacks", {}).values() if isinstance(own, dict))
    known = not ours and not isinstance(average, LAWA)  # of which Lightning has no like
    updates = _updates(checkpoint.get("averaging_state", {})) if known else 0
    states = checkpoint.get("callbacks", {}).values()
    asked = [[own["latest_update_step"], -1] for own in states if isinstance(own, dict) and "latest_update_step" in own]
    state = {"counters": [], "raw": raw, "averaged": {}, "updates_of_lightning": updates}
    return {**state, "asked": asked[0]} if asked else state


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
