"""Batches for a forward pass beside training: an iterator of its own, and the run's draws untouched."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim.averaging.batchnorm import Write, refresh_batchnorm_, statistics_layers
from lightning_optim.schedules import check_number


def refresh_(
    trainer: Trainer,
    pl_module: LightningModule,
    forward: Callable[[Any], Any],
    loader: Iterable[Any] | None,
    batches: int | None,
    seed: int,
    layers: Sequence[_BatchNorm] | None = None,
    write: Write | None = None,
) -> None:
    """Estimate the BatchNorm statistics of the present weights, on training data, over all ranks.

    Args:
        trainer: The running Trainer.
        pl_module: Its model.
        forward: Runs the model on a batch that is on the device.
        loader: Where the batches come from; ``None``: the training data.
        batches: How many; ``None``: all. On one rank never more than the loader has.
        seed: Of the draws within, so that a resumed run estimates the same.
        layers: Whose. Default: those that are in training mode; a layer in eval mode is frozen.
        write: As of :func:`refresh_batchnorm_`.
    """
    layers = in_training(statistics_layers(pl_module)) if layers is None else layers
    if not layers:
        return
    if loader is None:
        loader, batches = _training_data(trainer), _limit(trainer, batches)
    group = data_group(trainer)
    with isolate_rng(), _draws_kept(loader) as generators, trainer.precision_plugin.forward_context():
        _seed(seed + trainer.global_rank, generators)
        # A forward that communicates must run equally often on all ranks.
        together = group if isinstance(trainer.strategy, ModelParallelStrategy) or _synchronizes(layers) else None
        seen = _on_device(trainer, pl_module, _take(loader, batches, together))
        refresh_batchnorm_(pl_module, seen, forward, layers=layers, group=group, write=write)


def in_training(layers: Sequence[_BatchNorm]) -> list[_BatchNorm]:
    """Those that are not frozen."""
    return [layer for layer in layers if layer.training]


def data_group(trainer: Trainer) -> dist.ProcessGroup | None:
    """The ranks that train on different data; ``None`` for one process."""
    if not (dist.is_available() and dist.is_initialized()) or trainer.world_size == 1:
        return None
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh["data_parallel"]
        return mesh.get_group() if mesh.size() > 1 else None
    return dist.group.WORLD


def run_forward(pl_module: LightningModule, batch: Any) -> Any:
    """``forward`` with the part of a training batch that looks like its input.

    Of a tuple or list the first item; of a dictionary the entries that ``forward`` names; else the batch itself.
    """
    if isinstance(batch, Mapping):
        parameters = inspect.signature(pl_module.forward).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        inputs = {name: value for name, value in batch.items() if takes_all or name in parameters}
        return pl_module(**inputs) if inputs else pl_module(batch)
    return pl_module(batch[0] if isinstance(batch, tuple | list) else batch)


def check_forward(pl_module: LightningModule, name: str) -> None:
    """Raise if the statistics could not be refreshed: there are some, and no ``forward`` that updates them."""
    if statistics_layers(pl_module) and not is_overridden("forward", pl_module):
        raise MisconfigurationException(
            f"{name} estimates BatchNorm statistics anew by a forward pass, and {type(pl_module).__name__} has no"
            ' `forward`: write one, override `forward_batch`, or choose `buffers="average"`.'
        )


def check_arguments(batches: int | None, loader: Iterable[Any] | None) -> None:
    """Refuse a ``refresh_batches`` or a ``refresh_loader`` that cannot be used.

    Raises:
        ValueError: If so.
    """
    if batches is not None:
        check_number("refresh_batches", batches, low=1, integer=True)
    if loader is not None:
        if not isinstance(loader, Iterable):
            raise ValueError(f"`refresh_loader` must be a loader of batches, which can be iterated, got {loader!r}")
        own_copy(loader)


def own_copy(loader: Any) -> Any:
    """A loader over the same data that can be iterated while ``loader`` itself is being iterated.

    Raises:
        ValueError: If there is no second iterator: the data can be read once only.
    """
    if isinstance(loader, CombinedLoader):
        copied = copy.copy(loader)
        copied.flattened = [own_copy(part) for part in loader.flattened]
        copied.__dict__["_iterator"] = None
        return copied
    if not isinstance(loader, DataLoader):
        return _copy_of(loader)
    copied = copy.copy(loader)
    # Workers that persist belong to the one iterator of the loader that trains. Set past DataLoader's own guard.
    changed: dict[str, Any] = {"_iterator": None, "persistent_workers": False}
    if isinstance(loader.dataset, IterableDataset):
        changed["dataset"] = loader.dataset if loader.num_workers else _copy_of(loader.dataset)
    else:
        changed["sampler"] = copy.copy(loader.sampler)
        if loader.batch_sampler is not None:
            batch_sampler: Any = copy.copy(loader.batch_sampler)
            changed["batch_sampler"] = batch_sampler
            if getattr(batch_sampler, "sampler", None) is loader.sampler:
                batch_sampler.sampler = changed["sampler"]
    copied.__dict__.update(changed)
    return copied


def _copy_of(data: Any) -> Any:
    refused = ValueError(
        f"BatchNorm statistics are estimated over an iterator of their own, and {type(data).__name__} can be read once"
        ' only: give `refresh_loader=`, a loader that can be iterated anew, or choose `buffers="average"`.'
    )
    if isinstance(data, Iterator):
        raise refused
    if isinstance(data, IterableDataset):
        try:
            return copy.deepcopy(data)  # its position, files and queues
        except TypeError as error:
            raise refused from error
    return copy.copy(data)


def _training_data(trainer: Trainer) -> Iterable[Any]:
    combined = trainer.fit_loop._combined_loader
    assert combined is not None, "the training data are there before the first step"
    return combined


def _limit(trainer: Trainer, batches: int | None) -> int | None:
    available = trainer.num_training_batches
    if batches is None:
        return None if available == float("inf") else int(available)
    return int(min(batches, available))


def _take(loader: Iterable[Any], batches: int | None, together: dist.ProcessGroup | None) -> Iterator[Any]:
    """The first batches, of a copy of the loader; with ``together`` as many as every rank has."""
    combined = own_copy(loader)
    parts = combined.flattened if isinstance(combined, CombinedLoader) else [combined]
    resumes, count = any(hasattr(part, "state_dict") for part in parts), 0
    while batches is None or count < batches:
        before, iterator = count, iter(combined)
        while (batches is None or count < batches) and _all_have(item := next(iterator, _END), together):
            yield item[0] if isinstance(combined, CombinedLoader) else item
            count += 1
        # A loader that resumed in the middle of an epoch starts there, and gives the rest in a second pass.
        if batches is None or count == before or not resumes:
            return


_END: Any = object()


def _all_have(item: Any, group: dist.ProcessGroup | None) -> bool:
    if group is None:
        return item is not _END
    has = torch.tensor([item is not _END], dtype=torch.int, device=_device_of(group))
    dist.all_reduce(has, op=dist.ReduceOp.MIN, group=group)
    return bool(has.item())


def _device_of(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _on_device(trainer: Trainer, pl_module: LightningModule, batches: Iterator[Any]) -> Iterator[Any]:
    """What Lightning does with each batch before ``training_step`` gets it."""
    for batch in batches:
        converted = trainer.precision_plugin.convert_input(batch)
        converted = pl_module._on_before_batch_transfer(converted, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(converted, dataloader_idx=0)


def _synchronizes(layers: Sequence[_BatchNorm]) -> bool:
    return any(isinstance(layer, nn.SyncBatchNorm) for layer in layers)


# ---- random draws ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _draws_kept(loader: Any) -> Iterator[list[torch.Generator]]:
    """Put back, afterwards, every generator that the loader, its samplers and its datasets hold; yield torch's."""
    held = [value for owner in _parts(loader) for value in vars(owner).values()]
    torchs = list({id(g): g for g in held if isinstance(g, torch.Generator)}.values())
    states = [generator.get_state() for generator in torchs]
    others = [(value, copy.deepcopy(value)) for value in held if isinstance(value, random.Random) or _is_numpy(value)]
    try:
        yield torchs
    finally:
        for generator, state in zip(torchs, states, strict=True):
            generator.set_state(state)
        for value, before in others:
            _put_back(value, before)


def _is_numpy(value: Any) -> bool:
    return type(value).__module__.startswith("numpy.random")


def _put_back(value: Any, before: Any) -> None:
    if isinstance(value, random.Random):
        value.setstate(before.getstate())
    elif hasattr(value, "bit_generator"):
        value.bit_generator.state = before.bit_generator.state
    elif hasattr(value, "set_state"):
        value.set_state(before.get_state())


def _parts(loader: Any) -> list[Any]:
    """The objects that may hold a generator: loaders, samplers, datasets and what these wrap, transforms."""
    found: list[Any] = []
    queue = list(loader.flattened) if isinstance(loader, CombinedLoader) else [loader]
    while queue:
        part = queue.pop()
        if part is None or not hasattr(part, "__dict__") or any(part is known for known in found):
            continue
        found.append(part)
        queue += [getattr(part, name, None) for name in ("sampler", "batch_sampler", "dataset", "transform")]
    return found


def _seed(seed: int, generators: list[torch.Generator]) -> None:
    import numpy

    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    for generator in generators:
        generator.manual_seed(seed)
