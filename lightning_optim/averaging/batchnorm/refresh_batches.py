"""Take batches for a refresh from a separate iterator; the positions and the random state of the run do not change."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim.base.arguments import check_number
from lightning_optim.runtime.lightning import CombinedLoader, Trainer
from lightning_optim.runtime.lightning.data_loading import combined_loader, copy_without_iterator
from lightning_optim.runtime.random_state import (
    generator_state,
    is_generator,
    isolated_random_state,
    set_generator_state_,
)


@contextlib.contextmanager
def separate_batches(
    trainer: Trainer, loader: Iterable[Any] | None, count: int | None, seed: int, group: dist.ProcessGroup | None
) -> Iterator[Iterator[Any]]:
    """Context manager: yield an iterator over the first batches of a copy of the loader.

    Args:
        trainer: The running Trainer.
        loader: The loader to copy; ``None``: that of the training data.
        count: Number of batches, at most those of one epoch; ``None``: all.
        seed: Seed of the random state in this context, so that a resumed run gets the same batches. Afterwards the
            random state is as before.
        group: Ranks that train on different data. Each gets as many batches as the rank with the fewest has.
    """
    if loader is None:
        loader = combined_loader(trainer.fit_loop)
        assert loader is not None, "the loader exists before the first step"
        limit = min(math.inf if count is None else count, trainer.num_training_batches)
        count = None if limit == math.inf else int(limit)
    with isolated_random_state(), _generators_kept(loader) as generators:
        # Ranks outside of `group` hold shards of the same data-parallel replica and need the same batches.
        _seed(seed + (0 if group is None else dist.get_rank(group)), generators)
        with contextlib.closing(_take(loader, count, group)) as batches:
            yield batches


def check_arguments(batches: int | None, loader: Iterable[Any] | None) -> None:
    """Check the arguments ``refresh_batches`` and ``refresh_loader``.

    Raises:
        ValueError: If the first is not a positive integer or ``None``, or the second cannot be iterated twice.
    """
    if batches is not None:
        check_number("refresh_batches", batches, low=1, integer=True)
    if loader is not None:
        if not isinstance(loader, Iterable):
            raise ValueError(f"`refresh_loader` must be a loader of batches, which can be iterated, got {loader!r}")
        own_copy(loader)


def own_copy(loader: Any) -> Any:
    """Return a loader of the same data that can be iterated while ``loader`` itself is being iterated.

    Raises:
        ValueError: If the data can be read only once.
    """
    if isinstance(loader, CombinedLoader):
        copied = copy_without_iterator(loader)
        copied.flattened = [own_copy(part) for part in loader.flattened]
        return copied
    if not isinstance(loader, DataLoader):
        return _copy_of(loader)
    # Persistent workers belong to the iterator that trains. DataLoader's `__setattr__` refuses to change these.
    changed: dict[str, Any] = {"persistent_workers": False}
    if isinstance(loader.dataset, IterableDataset):
        changed["dataset"] = loader.dataset if loader.num_workers else _copy_of(loader.dataset)
    else:
        changed["sampler"] = copy.copy(loader.sampler)
        if loader.batch_sampler is not None:
            batch_sampler: Any = copy.copy(loader.batch_sampler)
            changed["batch_sampler"] = batch_sampler
            if getattr(batch_sampler, "sampler", None) is loader.sampler:
                batch_sampler.sampler = changed["sampler"]
    return copy_without_iterator(loader, **changed)


def _copy_of(data: Any) -> Any:
    refused = ValueError(
        f"BatchNorm statistics are estimated with a separate iterator, and {type(data).__name__} can be read only once:"
        ' pass `refresh_loader=`, a loader that can be iterated again, or `buffers="average"`.'
    )
    if isinstance(data, Iterator):
        raise refused
    if isinstance(data, IterableDataset):
        try:
            return copy.deepcopy(data)  # its position, files and queues
        except TypeError as error:
            raise refused from error
    return copy.copy(data)


def _take(loader: Iterable[Any], batches: int | None, group: dist.ProcessGroup | None) -> Generator[Any, None, None]:
    combined = own_copy(loader)
    parts = combined.flattened if isinstance(combined, CombinedLoader) else [combined]
    resumes, count = any(hasattr(part, "state_dict") for part in parts), 0
    while batches is None or count < batches:
        before, iterator = count, iter(combined)
        while (batches is None or count < batches) and all_agree((item := next(iterator, _END)) is not _END, group):
            yield item[0] if isinstance(combined, CombinedLoader) else item
            count += 1
        # A loader that was resumed in the middle of an epoch starts there, and has the other batches in a second pass.
        if batches is None or count == before or not resumes:
            return


_END: Any = object()


def all_agree(answer: bool, group: dist.ProcessGroup | None) -> bool:
    """Return True if ``answer`` is true on all ranks of the group."""
    if group is None:
        return answer
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    answers = torch.tensor([answer], dtype=torch.int, device=device)
    dist.all_reduce(answers, op=dist.ReduceOp.MIN, group=group)
    return bool(answers.item())


# ---- random draws ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _generators_kept(loader: Any) -> Iterator[list[torch.Generator]]:
    """Context manager: yield torch's generators of the loader; afterwards all its generators have their state again."""
    held = [value for owner in _parts(loader) for value in vars(owner).values() if is_generator(value)]
    states = [(generator, generator_state(generator)) for generator in {id(g): g for g in held}.values()]
    try:
        yield [generator for generator, _ in states if isinstance(generator, torch.Generator)]
    finally:
        for generator, state in states:
            set_generator_state_(generator, state)


def _parts(loader: Any) -> list[Any]:
    """Return the objects that may hold a generator: loaders, samplers, datasets, datasets in these, transforms."""
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
