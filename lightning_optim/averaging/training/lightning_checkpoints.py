"""Exchange checkpoints with Lightning's own averaging callbacks, in both directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.averaging.averages.average import Average
from lightning_optim.averaging.averages.lawa import LAWA
from lightning_optim.averaging.training import pruned_parameters
from lightning_optim.averaging.training.averaged_tensors import by_plain_name
from lightning_optim.averaging.training.averaged_weights import AveragedWeights
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.callback_state import edit_before_write
from lightning_optim.runtime.lightning import Strategy, Trainer
from lightning_optim.runtime.order import Slot


def add_for_lightning(checkpoint: dict[str, Any], average: AveragedWeights, masks: dict[str, Tensor]) -> None:
    """Add the two entries from which Lightning's ``WeightAveraging`` resumes: the raw weights and a counter.

    The raw weights share storage with those in the callback's state, so that the checkpoint grows only by the tensors
    that are not averaged. Nothing is added for a sharded model, which Lightning's class refuses.

    Args:
        checkpoint: The checkpoint, which is changed in place.
        average: The average in its ``state_dict``.
        masks: Masks of weights whose pruning is permanent in checkpoints.
    """
    if any(isinstance(source.parameter, DTensor) for sources in average.sources for source in sources):
        return
    saved = pruned_parameters.permanent(checkpoint.get("state_dict", {}), masks)
    raw = by_plain_name(pruned_parameters.permanent(average.raw(), masks))
    checkpoint["current_model_state"] = {name: raw.get(plain_name(name), value) for name, value in saved.items()}
    checkpoint["averaging_state"] = {"n_averaged": torch.tensor(average.updates)}


def leave_out_as_state_dict(strategy: Strategy) -> None:
    """Remove from the raw weights of the next checkpoint the names that the module removes from ``state_dict``.

    A module that keeps a frozen base out of its checkpoints deletes it in its own ``on_save_checkpoint``, which is
    called after those of callbacks. So this is done when the checkpoint is written.
    """

    def edit(checkpoint: dict[str, Any]) -> None:
        saved, raw = checkpoint.get("state_dict", {}), checkpoint.get("current_model_state", {})
        if saved.keys() < raw.keys():  # false if the module renames its weights in checkpoints
            checkpoint["current_model_state"] = {name: raw[name] for name in saved}

    edit_before_write(strategy, edit)


def receiver_of_raw_weights(trainer: Trainer, checkpoint: dict[str, Any]) -> OptimCallback | None:
    """Return the callback that loads the raw weights beside ``state_dict``; ``None`` if an average saved its own.

    This is the evaluated average, else the first one.
    """
    averages = [cb for cb in trainer.callbacks if isinstance(cb, OptimCallback) and cb.slot is Slot.AVERAGE]
    states = checkpoint.get("callbacks", {})
    if any(states.get(callback.state_key, {}).get("raw") for callback in averages):
        return None
    return next((callback for callback in averages if callback.evaluates), averages[0])


def state_from_other_average(checkpoint: dict[str, Any], average: Average, key: str) -> dict[str, Any] | None:
    """Return the state with which an average resumes if the ``state_dict`` is the average of another callback.

    Lightning's ``WeightAveraging`` saves its average as ``state_dict`` with the raw weights beside it; the average goes
    on from there. Another average of this package does so too; then only the raw weights are loaded, and the average
    begins anew or goes on from its own state.

    Args:
        checkpoint: The loaded checkpoint. If it has a state under ``key``, the raw weights are added to it.
        average: The policy of the average that resumes.
        key: The callback's key in the checkpoint.

    Returns:
        A state without counters, which :func:`with_counters` adds when the steps of each optimizer are known; ``None``
        if there is nothing to take over.
    """
    raw = checkpoint.get("current_model_state")
    if raw is None:
        return None
    if (own := checkpoint.get("callbacks", {}).get(key)) is not None:
        own["raw"] = raw
        return None
    ours = any("counters" in own for own in checkpoint.get("callbacks", {}).values() if isinstance(own, dict))
    known = not ours and not isinstance(average, LAWA)  # Lightning has no average of that kind
    updates = _updates(checkpoint.get("averaging_state", {})) if known else 0
    states = checkpoint.get("callbacks", {}).values()
    asked = [[own["latest_update_step"], -1] for own in states if isinstance(own, dict) and "latest_update_step" in own]
    state = {"counters": [], "raw": raw, "averaged": {}, "updates_of_lightning": updates}
    return {**state, "asked": asked[0]} if asked else state


def with_counters(loaded: dict[str, Any], steps: list[int]) -> dict[str, Any]:
    """Return a loaded state with counters. Lightning counts updates, but not the steps of each optimizer."""
    updates = loaded.get("updates_of_lightning", 0)
    if not updates:
        return loaded
    counters = [{"updates": updates, "first": max(0, step - updates + 1), "last": step} for step in steps]
    return {**loaded, "counters": counters}


def _updates(averaging_state: dict[str, Any]) -> int:
    count = averaging_state.get("n_averaged", 0)
    return int(count.item() if isinstance(count, Tensor) else count)
