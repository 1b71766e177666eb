"""Read the settings of Lightning's pruning callback, and the parameter that a pruning method of torch prunes."""

from __future__ import annotations

from torch.nn.utils.prune import BasePruningMethod

from lightning_optim.runtime.lightning import Callback, ModelPruning
from lightning_optim.runtime.lightning.private_names import read_private


def is_permanent_in_checkpoints(callback: Callback) -> bool:
    """Return True if the callback writes pruned weights into checkpoints as if pruning were permanent."""
    return isinstance(callback, ModelPruning) and read_private(callback, "_make_pruning_permanent")


def prunes_in_validation(callback: Callback) -> bool:
    """Return True if the callback prunes within a validation, and not at the end of a training epoch."""
    return isinstance(callback, ModelPruning) and not read_private(callback, "_prune_on_train_epoch_end")


def resets_weights(callback: Callback) -> bool:
    """Return True if a pruning callback sets weights back to their first values (the lottery ticket hypothesis)."""
    return bool(read_private(callback, "_use_lottery_ticket_hypothesis"))


def pruned_name(method: BasePruningMethod) -> str:
    """Return the name of the parameter that the method prunes: ``weight``, of ``weight_orig`` and ``weight_mask``."""
    return read_private(method, "_tensor_name")
