"""Decide whether a resume from here is exact, and say what to change where it is not."""

from __future__ import annotations

from typing import Any

from lightning_optim.runtime.lightning import Trainer
from lightning_optim.runtime.lightning.data_loading import saves_position, training_loaders
from lightning_optim.runtime.lightning.loops import is_last_batch, window_is_open
from lightning_optim.runtime.order import Slot, callbacks_in


def resumes_exactly_from_here(trainer: Trainer) -> bool:
    """Return True if a run that resumes from a checkpoint written now, with ``ExactResume``, equals this one.

    Within an epoch of manual optimization the answer is always False: only the module knows whether it accumulates.
    """
    within_epoch = not is_last_batch(trainer)
    if within_epoch and not trainer.lightning_module.automatic_optimization:
        return False
    return not inexact_parts(trainer, within_epoch)


def inexact_parts(trainer: Trainer, within_epoch: bool) -> list[str]:
    """Name the parts of a run that no checkpoint holds, each with what to change.

    Args:
        trainer: A Trainer whose training data are set up, when a checkpoint is written or resumed from.
        within_epoch: True if batches of the running epoch are left.
    """
    parts = _inexact_within_epoch(trainer) if within_epoch else []
    if any(getattr(loader, "persistent_workers", False) for loader in training_loaders(trainer)):
        parts.append(
            "worker processes that outlive an epoch go on with a random state that no checkpoint holds: set"
            " `persistent_workers=False` if the data set draws random numbers"
        )
    return parts


def _inexact_within_epoch(trainer: Trainer) -> list[str]:
    parts = [
        f"the checkpoint is from the middle of an epoch and {doubt}, or resume from an epoch's end"
        for doubt in loader_doubts(trainer)
    ]
    if any(getattr(loader, "num_workers", 0) for loader in training_loaders(trainer)):
        parts.append(
            "the checkpoint is from the middle of an epoch and holds no random state of worker processes: set"
            " `num_workers=0`, or resume from an epoch's end, if the data set draws random numbers"
        )
    if window_is_open(trainer) and not _window_is_saved(trainer):
        parts.append(
            "the checkpoint does not hold the gradients of the accumulation window that was open: use"
            " `GradientAccumulation` in place of `Trainer(accumulate_grad_batches=…)`"
        )
    return parts


def loader_doubts(trainer: Trainer) -> list[str]:
    """Return what keeps the training loaders from going on in the middle of an epoch, with what to change."""
    doubts, loaders = [], training_loaders(trainer)
    if not all(map(saves_position, loaders)):
        doubts.append(
            "a training loader does not save its position: give it `state_dict` and `load_state_dict` (torchdata's"
            " `StatefulDataLoader` has them)"
        )
    if not all(map(_has_length, loaders)):
        doubts.append(
            "a training loader has no length, so that Lightning fetches one batch more than the checkpoint holds: give"
            " the loader `__len__`"
        )
    return doubts


def _window_is_saved(trainer: Trainer) -> bool:
    """Return True if a callback of this package saves an open window, and its gradients are here."""
    saves = callbacks_in(trainer, Slot.ACCUMULATE)
    return bool(saves) and any(parameter.grad is not None for parameter in trainer.lightning_module.parameters())


def _has_length(loader: Any) -> bool:
    try:
        return len(loader) >= 0
    except (TypeError, NotImplementedError):  # it has no `__len__`, or its data set has none
        return False
