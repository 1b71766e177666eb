"""Save and load what an exact resume needs of each rank beside a checkpoint of Lightning: random state and loaders.

States are tensors and plain values, so that a checkpoint that holds them loads with ``weights_only=True``.
"""

from __future__ import annotations

from typing import Any

from lightning_optim.runtime.capture import buffer_broadcast, set_buffer_broadcast_
from lightning_optim.runtime.lightning import Trainer, _set_sampler_epoch
from lightning_optim.runtime.random_state import rank_random_state, set_rank_random_state_


def moment(trainer: Trainer) -> dict[str, Any]:
    """Return what a validation changes: random state, its count of batches, and whether DDP broadcasts buffers next."""
    validated = dict(trainer.fit_loop.epoch_loop.val_loop._seen_batches_per_dataloader)
    return {**rank_random_state(trainer), "validated": validated, "broadcasts": buffer_broadcast(trainer)}


def set_moment_(trainer: Trainer, state: dict[str, Any]) -> None:
    """Set what :func:`moment` returned."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    if state["validated"]:
        if val_loop._combined_loader is None:  # building it empties the count
            trainer.validating = True
            val_loop.setup_data()
            trainer.training = True
        val_loop._seen_batches_per_dataloader.update(state["validated"])
    set_buffer_broadcast_(trainer, state.get("broadcasts"))
    set_rank_random_state_(trainer, state)


def loaders(trainer: Trainer) -> list[Any]:
    """Return the training loaders, in Lightning's order; none before they are set up."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def loader_state(trainer: Trainer) -> dict[str, Any]:
    """Return the positions of training loaders, the seeds of distributed samplers, and when loaders were built."""
    fit_loop, val_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
    combined = fit_loop._combined_loader
    return {
        "positions": [] if combined is None else combined._state_dicts(),
        "seeds": [_seed(loader) for loader in loaders(trainer)],
        "rebuilt": [fit_loop._last_train_dl_reload_epoch, val_loop._last_val_dl_reload_epoch],
    }


def set_positions_(trainer: Trainer, positions: list[Any], seeds: list[int | None]) -> None:
    """Set the positions of the training loaders and the seeds of their samplers, and start an iterator there."""
    fit_loop = trainer.fit_loop
    for loader, seed in zip(loaders(trainer), seeds, strict=False):
        if seed is not None and _seed(loader) is not None:
            loader.sampler.seed = seed
    if positions:
        assert fit_loop._combined_loader is not None and fit_loop._data_fetcher is not None
        for loader in loaders(trainer):
            _set_sampler_epoch(loader, fit_loop.epoch_progress.current.processed)
        fit_loop._combined_loader._load_state_dicts(positions)
        iter(fit_loop._data_fetcher)


def set_rebuilt_(trainer: Trainer, rebuilt: list[float]) -> None:
    """Set in which epochs loaders were built, if they are rebuilt every n epochs."""
    fit_loop, val_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
    if trainer.reload_dataloaders_every_n_epochs:
        fit_loop._last_train_dl_reload_epoch, val_loop._last_val_dl_reload_epoch = rebuilt


def _seed(loader: Any) -> int | None:
    seed = getattr(getattr(loader, "sampler", None), "seed", None)
    return seed if isinstance(seed, int) else None
