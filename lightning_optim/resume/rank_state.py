"""Save and load the state of a rank that Lightning's checkpoints lack: random state, positions and seeds of loaders.

States are tensors and plain values, so that a checkpoint that holds them loads with ``weights_only=True``.
"""

from __future__ import annotations

from typing import Any

from lightning_optim.runtime.lightning import Trainer, data_loading, strategies
from lightning_optim.runtime.random_state import rank_random_state, set_rank_random_state_


def moment(trainer: Trainer) -> dict[str, Any]:
    """Return the state that a validation changes: random state, its count of batches, DDP's broadcast of buffers."""
    validated = dict(data_loading.validated_batches(trainer))
    return {**rank_random_state(trainer), "validated": validated, "broadcasts": strategies.broadcast_is_due(trainer)}


def set_moment_(trainer: Trainer, state: dict[str, Any]) -> None:
    """Set the state that :func:`moment` returned."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    if state["validated"]:
        if data_loading.combined_loader(val_loop) is None:  # building it empties the count
            trainer.validating = True
            val_loop.setup_data()
            trainer.training = True
        data_loading.validated_batches(trainer).update(state["validated"])
    strategies.set_broadcast_is_due(trainer, state.get("broadcasts"))
    set_rank_random_state_(trainer, state)


def loader_state(trainer: Trainer) -> dict[str, Any]:
    """Return the positions of training loaders, the seeds of distributed samplers, and when loaders were built."""
    return {
        "positions": data_loading.positions(trainer),
        "seeds": [_seed(loader) for loader in data_loading.training_loaders(trainer)],
        "rebuilt": data_loading.reload_epochs(trainer),
    }


def set_positions_(trainer: Trainer, positions: list[Any], seeds: list[int | None]) -> None:
    """Set the positions of the training loaders and the seeds of their samplers, and start an iterator there."""
    for loader, seed in zip(data_loading.training_loaders(trainer), seeds, strict=False):
        if seed is not None and _seed(loader) is not None:
            loader.sampler.seed = seed
    if positions:
        data_loading.load_positions_(trainer, positions)


def set_rebuilt_(trainer: Trainer, rebuilt: list[float]) -> None:
    """Set in which epochs loaders were built, if they are rebuilt every n epochs."""
    if trainer.reload_dataloaders_every_n_epochs:
        data_loading.set_reload_epochs(trainer, rebuilt)


def _seed(loader: Any) -> int | None:
    seed = getattr(getattr(loader, "sampler", None), "seed", None)
    return seed if isinstance(seed, int) else None
