"""Read the loaders of a running fit and set their positions; prepare a batch as Lightning does for a step."""

from __future__ import annotations

import copy
from typing import Any

from lightning_optim.runtime.lightning import CombinedLoader, LightningModule, Trainer
from lightning_optim.runtime.lightning.modules import takes_argument
from lightning_optim.runtime.lightning.packages import found
from lightning_optim.runtime.lightning.private_names import read_private, write_private


def combined_loader(loop: Any) -> CombinedLoader | None:
    """Return the loaders that the fit loop or the validation loop reads together; ``None`` before they are set up."""
    return read_private(loop, "_combined_loader")


def loaders_of(loop: Any) -> list[Any]:
    """Return the loaders of the fit loop or the validation loop, in Lightning's order; empty before they are set up."""
    combined = combined_loader(loop)
    return [] if combined is None else combined.flattened


def training_loaders(trainer: Trainer) -> list[Any]:
    """Return the training loaders, in Lightning's order; empty before they are set up."""
    return loaders_of(trainer.fit_loop)


# ---- positions -------------------------------------------------------------------------------------------------------


def saves_position(loader: Any) -> bool:
    """Return True if a loader saves its position and takes it again."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def positions(trainer: Trainer) -> list[Any]:
    """Return the positions of those training loaders that save them, in Lightning's order."""
    return [loader.state_dict() for loader in training_loaders(trainer) if saves_position(loader)]


def take_saved_positions(trainer: Trainer) -> list[Any]:
    """Return the positions that a checkpoint holds, and keep Lightning from loading them."""
    saved = read_private(trainer.fit_loop, "_combined_loader_states_to_load")
    write_private(trainer.fit_loop, "_combined_loader_states_to_load", [])
    return saved


def load_positions_(trainer: Trainer, saved: list[Any]) -> None:
    """Bring the training loaders to saved positions, and start an iterator there.

    Raises:
        RuntimeError: If there are more loaders that take a position, or fewer, than there are positions.
    """
    loaders = [loader for loader in training_loaders(trainer) if saves_position(loader)]
    if len(loaders) != len(saved):
        raise RuntimeError(
            f"The checkpoint holds the positions of {len(saved)} training loaders, and {len(loaders)} of the present"
            " loaders can take one: resume with the loaders that were used when it was written."
        )
    for loader in training_loaders(trainer):
        set_sampler_epoch(loader, trainer.fit_loop.epoch_progress.current.processed)
    for loader, position in zip(loaders, saved, strict=True):
        loader.load_state_dict(position)
    iter(data_fetcher(trainer))


def set_sampler_epoch(loader: Any, epoch: int) -> None:
    """Tell the samplers of a loader the epoch, as Lightning does before each: a distributed one shuffles by it."""
    samplers = [getattr(owner, "sampler", None) for owner in (loader, getattr(loader, "batch_sampler", None))]
    for sampler in {id(sampler): sampler for sampler in samplers}.values():
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(epoch)


def data_fetcher(trainer: Trainer) -> Any:
    """Return the object that takes batches from the training loaders; ``iter`` of it starts their iterators anew."""
    return read_private(trainer.fit_loop, "_data_fetcher")


# ---- counts of epochs and batches ------------------------------------------------------------------------------------


def reload_epochs(trainer: Trainer) -> list[float]:
    """Return the epochs in which the training and the validation loaders were built last."""
    fit_loop, val_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
    return [
        read_private(fit_loop, "_last_train_dl_reload_epoch"),
        read_private(val_loop, "_last_val_dl_reload_epoch"),
    ]


def set_reload_epochs(trainer: Trainer, epochs: list[float]) -> None:
    """Set the epochs that :func:`reload_epochs` returns."""
    training, validation = epochs
    write_private(trainer.fit_loop, "_last_train_dl_reload_epoch", training)
    write_private(trainer.fit_loop.epoch_loop.val_loop, "_last_val_dl_reload_epoch", validation)


def validated_batches(trainer: Trainer) -> dict[int, int]:
    """Return the number of batches of each validation loader in this run, which are the steps of what they log."""
    return read_private(trainer.fit_loop.epoch_loop.val_loop, "_seen_batches_per_dataloader")


# ---- batches ---------------------------------------------------------------------------------------------------------


def batch_size_of(batch: Any) -> Any:
    """Return the number of samples by which Lightning weights a batch: the first dimension of its first tensor."""
    return found("extract_batch_size", "utilities.data")[0](batch)  # the same in both packages


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Convert and move a batch as Lightning does before ``training_step`` gets it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = read_private(pl_module, "_on_before_batch_transfer")(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def training_step_arguments(pl_module: LightningModule, batch: Any, batch_idx: int) -> list[Any]:
    """Return the arguments with which Lightning calls ``training_step``: its second one is optional."""
    with_index = takes_argument(pl_module, "training_step", "batch_idx", min_args=2)
    return [batch, batch_idx] if with_index else [batch]


def copy_without_iterator(loader: Any, **changed: Any) -> Any:
    """Return a shallow copy of a DataLoader or a CombinedLoader that makes an iterator of its own.

    Args:
        loader: The loader.
        changed: Attributes of the copy, set past the loader's own checks.
    """
    read_private(loader, "_iterator")  # is there: the copy must not share it
    copied = copy.copy(loader)
    copied.__dict__.update({**changed, "_iterator": None})
    return copied
