"""What an exact resume needs of each rank, beside what Lightning saves: random state, loaders, what was logged so far.

Tensors and plain values only, so that a checkpoint that holds them loads with ``weights_only=True``.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_optim.runtime.lightning import Trainer, _set_sampler_epoch

# A file names a reduction by its place here: what a file says is never looked up among all functions.
_REDUCTIONS = (torch.mean, torch.sum, torch.max, torch.min, sum, max, min)
_BROADCASTS = "require_forward_param_sync"
_SHOWN = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_META = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "metric_attribute",
)


def random_state() -> dict[str, Any]:
    """The state of the global generators: torch (CPU and all CUDA devices), Python, and NumPy if it is imported.

    Example::

        >>> before = random_state()
        >>> first = torch.rand(2), random.random()
        >>> set_random_state_(before)
        >>> second = torch.rand(2), random.random()
        >>> torch.equal(first[0], second[0]), first[1] == second[1]
        (True, True)
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, torch.tensor(words), gauss]}
    if "numpy" in sys.modules:
        numpy_state = sys.modules["numpy"].random.get_state()
        if isinstance(numpy_state, tuple):  # a dictionary, if the user has put another generator in
            kind, words, *rest = numpy_state
            state["numpy"] = [kind, torch.tensor(words.tolist()), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state_(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` returned. A device that is not here, or not in the state, is left alone."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if "numpy" in state and "numpy" in sys.modules:
        kind, words, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((kind, words.cpu().numpy().astype("uint32"), *rest))
    if torch.cuda.is_available():
        for device, device_state in zip(range(torch.cuda.device_count()), state.get("cuda", []), strict=False):
            torch.cuda.set_rng_state(device_state.cpu(), device)


def moment(trainer: Trainer) -> dict[str, Any]:
    """Return what a validation changes: generators, loaders' too, its count of batches, whether DDP broadcasts."""
    generators = [[generator.get_state() for generator in _generators(loop)] for loop in _loops(trainer)]
    validated = dict(trainer.fit_loop.epoch_loop.val_loop._seen_batches_per_dataloader)
    # DDP broadcasts buffers at the first forward after a backward, and not within a window that accumulates.
    broadcasts = getattr(trainer.strategy.model, _BROADCASTS, None)
    return {"random": random_state(), "generators": generators, "validated": validated, "broadcasts": broadcasts}


def set_moment_(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put back what :func:`moment` returned."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    if state["validated"]:
        if val_loop._combined_loader is None:  # to build it sets the count to nothing
            trainer.validating = True
            val_loop.setup_data()
            trainer.training = True
        val_loop._seen_batches_per_dataloader.update(state["validated"])
    if state.get("broadcasts") is not None and hasattr(trainer.strategy.model, _BROADCASTS):
        setattr(trainer.strategy.model, _BROADCASTS, state["broadcasts"])
    for loop, saved in zip(_loops(trainer), state["generators"], strict=True):
        for generator, generator_state in zip(_generators(loop), saved, strict=False):
            generator.set_state(generator_state.cpu())
    set_random_state_(state["random"])


def loaders(trainer: Trainer) -> list[Any]:
    """The training loaders, in Lightning's order; empty before they are set up."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def loader_state(trainer: Trainer) -> dict[str, Any]:
    """The positions of training loaders, the seeds of distributed samplers, and when loaders were built."""
    fit_loop, val_loop = _loops(trainer)
    combined = fit_loop._combined_loader
    return {
        "positions": [] if combined is None else combined._state_dicts(),
        "seeds": [_seed(loader) for loader in loaders(trainer)],
        "rebuilt": [fit_loop._last_train_dl_reload_epoch, val_loop._last_val_dl_reload_epoch],
    }


def set_positions_(trainer: Trainer, positions: list[Any], seeds: list[int | None]) -> None:
    """Bring the training loaders to where they were, and start an iterator there."""
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
    """Put back in which epochs loaders were built, for who has them rebuilt every n epochs."""
    fit_loop, val_loop = _loops(trainer)
    if trainer.reload_dataloaders_every_n_epochs:
        fit_loop._last_train_dl_reload_epoch, val_loop._last_val_dl_reload_epoch = rebuilt


def metric_updates(trainer: Trainer) -> dict[str, int]:
    """How often each torchmetrics metric of the module was updated since its reset."""
    modules = trainer.lightning_module.named_modules()
    return {name: module._update_count for name, module in modules if isinstance(module, Metric)}


def logged_state(trainer: Trainer, leave_out: set[str] | None = None) -> dict[str, Any]:
    """What ``self.log`` and torchmetrics have gathered in this epoch, and the values that callbacks see.

    Args:
        trainer: A Trainer that fits.
        leave_out: Names of metrics that are not taken.
    """
    connector, epoch_loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    updates = {
        name: count for name, count in metric_updates(trainer).items() if count and name not in (leave_out or ())
    }
    modules = dict(trainer.lightning_module.named_modules())
    return {
        "shown": {name: _copied(getattr(connector, name)) for name in _SHOWN},
        "hook": connector._current_fx,
        # A process group cannot be saved, so a value that is reduced over one of the user's starts anew.
        "results": [_result(m) for m in epoch_loop._results.values() if not m.has_reset and m.meta.sync.group is None],
        "metrics": {name: [count, _copied(modules[name].metric_state)] for name, count in updates.items()},
    }


def set_logged_state_(trainer: Trainer, state: dict[str, Any], batches: int) -> None:
    """Put back what :func:`logged_state` returned.

    Args:
        trainer: A Trainer that fits.
        state: The state.
        batches: How many batches of the running epoch are done; 0 between epochs.
    """
    connector, device = trainer._logger_connector, trainer.strategy.root_device
    for name in _SHOWN:
        setattr(connector, name, _copied(state["shown"][name], device))
    # Lightning empties what a hook logged before when it logs in an epoch's first batch: this is not the first.
    connector._current_fx, connector._first_loop_iter = state["hook"], batches == 1 if batches else None
    modules = dict(trainer.lightning_module.named_modules())
    for name, (count, values) in state["metrics"].items():
        metric = modules.get(name)
        if isinstance(metric, Metric) and metric._defaults.keys() == values.keys():
            for key, value in values.items():
                setattr(metric, key, _copied(value, metric.device))
            metric._update_count, metric._computed = count, None
    for result in state["results"]:
        _set_result_(trainer, result, modules)


def _result(result: Any) -> dict[str, Any]:
    """One logged name: how it was logged, and the value so far."""
    meta = result.meta
    return {
        "meta": {name: getattr(meta, name) for name in _META},
        "reduction": _REDUCTIONS.index(meta.reduce_fx),
        "sync": [meta.sync.should, meta.sync.rank_zero_only],
        "states": _copied(result.metric_state) if result.is_tensor else None,
        "last": _copied(result._forward_cache) if isinstance(result._forward_cache, Tensor) else None,
    }


def _set_result_(trainer: Trainer, state: dict[str, Any], modules: dict[str, Any]) -> None:
    meta, (sync, rank_zero_only) = state["meta"], state["sync"]
    value = modules.get(meta["metric_attribute"]) if state["states"] is None else torch.zeros(())
    if not isinstance(value, Tensor | Metric):
        return
    results = trainer.fit_loop.epoch_loop._results
    # Logged once, so that Lightning builds the entry, and without reduction: a collective has no place here.
    results.log(
        value=value,
        reduce_fx=_REDUCTIONS[state["reduction"]],
        sync_dist_fn=trainer.strategy.reduce,
        batch_size=1,
        rank_zero_only=rank_zero_only,
        **meta,
    )
    result = results[f"{meta['fx']}.{meta['name']}"]
    result.meta.sync.should = sync
    for key, tensor in (state["states"] or {}).items():
        setattr(result, key, _copied(tensor, trainer.strategy.root_device))
    result._forward_cache = _copied(state["last"], trainer.strategy.root_device)


def _loops(trainer: Trainer) -> tuple[Any, Any]:
    return trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop


def _seed(loader: Any) -> int | None:
    seed = getattr(getattr(loader, "sampler", None), "seed", None)
    return seed if isinstance(seed, int) else None


def _generators(loop: Any) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for loader in [] if loop._combined_loader is None else loop._combined_loader.flattened:
        for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and not any(generator is other for other in found):
                found.append(generator)
    return found


def _copied(tree: Any, device: torch.device | str = "cpu") -> Any:
    if isinstance(tree, dict):
        return {name: _copied(value, device) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_copied(value, device) for value in tree]
    return tree.detach().clone().to(device) if isinstance(tree, Tensor) else tree
