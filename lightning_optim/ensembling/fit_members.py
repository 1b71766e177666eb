"""Train the members of an ensemble, one after the other."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_leaves

from lightning_optim.base.shards import reshard_
from lightning_optim.ensembling.member_files import CheckpointLabel, FinishedMembers, last_checkpoint, member_seed
from lightning_optim.resume.exact_resume import ExactResume
from lightning_optim.runtime.files.atomic_writing import write_atomically
from lightning_optim.runtime.lightning import (
    CheckpointIO,
    LightningDataModule,
    LightningModule,
    ModelCheckpoint,
    ModelParallelStrategy,
    Trainer,
    TrainerStatus,
    isolate_rng,
    rank_zero_info,
    seed_everything,
)


def fit_members(
    make_member: Callable[[int], LightningModule],
    size: int,
    make_trainer: Callable[[int], Trainer],
    data: Any,
    *,
    dirpath: str | Path,
    seed: int = 0,
) -> list[str]:
    r"""Train several models that differ in their seed, and in whatever else ``make_member`` makes of the index.

    For each index all random generators are seeded with a seed that follows from ``(seed, index)``, different for each
    index (:func:`~lightning_optim.ensembling.member_files.member_seed`); then ``make_member(index)``,
    ``make_trainer(index)`` and ``trainer.fit`` are called. So a member depends on ``(seed, index)``, and on nothing
    that happened before. What the fit ended with (the average, the best: what callbacks write into the module) goes to
    ``dirpath/member-{index}.ckpt``, and ``dirpath/members.json`` tells which are finished.

    **A run that is killed** and called again ends with the same members, bit for bit. A finished one is not trained
    again, unless its file is damaged. One that was under way goes on from the newest checkpoint that its Trainer's own
    ``ModelCheckpoint`` wrote, if the run can be exact from there, else it starts again from its seed. To that end
    :class:`~lightning_optim.ExactResume` is added to a Trainer that has a ``ModelCheckpoint``, which writes to
    ``dirpath/member-{index}`` if it has no ``dirpath`` of its own. Exact are files from an epoch's end; and from the
    middle of one, if the training loaders save their position (``state_dict``, as torchdata's do).

    The first ``k`` members are the same for every ``size``: a larger ``size`` extends an ensemble, a smaller one
    returns the first of its members. Another ``seed`` needs another ``dirpath``. What ``make_member`` and
    ``make_trainer`` do is not looked at: after a change there, take another ``dirpath`` too.

    Under DDP and FSDP2 all processes call this function, rank 0 writes, and all return the same list. They must share
    the file system that ``dirpath`` is on.

    Args:
        make_member: Makes the model of an index, with its first weights. It may make another architecture of each.
        size: The number of members. `Deep Ensembles <https://arxiv.org/abs/1612.01474>`_ takes five. The first few
            gain the most; :func:`~lightning_optim.cost_benefit` shows it for yours.
        make_trainer: Makes a new Trainer for an index.
        data: What ``trainer.fit`` takes: a LightningDataModule, a loader or several, ``None`` for the members' own; or
            a function of the index that returns it, for members on different data (bagging). Loaders are copied for
            each member, without their data sets: the order of one member's data does not depend on other members.
        dirpath: The folder for the members.
        seed: The seed of the whole ensemble.

    Returns:
        The members' files in their order, for :meth:`Ensemble.from_checkpoints <lightning_optim.Ensemble>`.

    Raises:
        ValueError: If an argument is not allowed, ``dirpath`` holds members of another seed, or its ``members.json`` is
            damaged.

    Example::

        >>> import tempfile
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> def make_trainer(index):
        ...     return Trainer(max_steps=1, barebones=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = fit_members(lambda index: BoringModel(), 2, make_trainer, None, dirpath=folder)
        ...     [Path(path).name for path in paths]
        ['member-0.ckpt', 'member-1.ckpt']
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"`size` is the number of members, an integer of at least 1, got {size!r}")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` is an integer of at least 0, got {seed!r}")
    manifest = FinishedMembers(Path(dirpath), seed)
    waiting = [index for index in range(size) if index not in manifest]
    rank_zero_info(f"Members: {size - len(waiting)} of {size} are finished in {manifest.folder}")
    begin = time.monotonic()
    with _restored():
        for done, index in enumerate(waiting):
            _fit_member(make_member, index, make_trainer, data, manifest)
            left = (time.monotonic() - begin) / (done + 1) * (len(waiting) - done - 1)
            rank_zero_info(f"Members: {index} is finished, {len(waiting) - done - 1} to go, about {left:.0f} s")
    return [str(manifest.path(index)) for index in range(size)]


@contextmanager
def _restored() -> Iterator[None]:
    """Leave the generators, and what ``seed_everything`` tells loaders' workers, as they were."""
    before = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    with isolate_rng():
        yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _fit_member(
    make_member: Callable[[int], LightningModule],
    index: int,
    make_trainer: Callable[[int], Trainer],
    data: Any,
    manifest: FinishedMembers,
) -> None:
    seed_everything(member_seed(manifest.seed, index), workers=True, verbose=False)
    member, trainer = make_member(index), make_trainer(index)
    if not isinstance(member, LightningModule):
        raise ValueError(f"`make_member` returns a LightningModule, got a {type(member).__name__}")
    if not isinstance(trainer, Trainer) or trainer.state.fn is not None:
        got = "one that was used already" if isinstance(trainer, Trainer) else f"a {type(trainer).__name__}"
        raise ValueError(f"`make_trainer` returns a new `lightning.pytorch.Trainer` for each member, got {got}")
    mark = CheckpointLabel(manifest.seed, index)
    _prepare(trainer, mark, manifest.folder / f"member-{index}")
    mark.resumes = last_checkpoint(trainer, mark)
    start = time.monotonic()
    trainer.fit(member, _own(data, index), ckpt_path=mark.resumes)
    if trainer.state.status is not TrainerStatus.FINISHED:
        raise RuntimeError(f"The fit of member {index} did not finish; call `fit_members` again to go on")
    reshard_(member)
    path = manifest.path(index)
    _save(trainer, path)
    if trainer.is_global_zero:
        epochs, steps = trainer.current_epoch, trainer.global_step
        manifest.add(index, epochs=epochs, steps=steps, seconds=round(time.monotonic() - start, 3))
    trainer.strategy.barrier("fit_members")


def _prepare(trainer: Trainer, mark: CheckpointLabel, folder: Path) -> None:
    """See that the Trainer's own files are this member's, say so, and can be resumed from exactly."""
    added: list[Any] = [mark]
    files = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    for callback in files:
        if callback.dirpath is None:
            # Lightning would take a folder by the logger's version, which is another one after a kill.
            callback.dirpath = str(folder)
    if files and not any(isinstance(callback, ExactResume) for callback in trainer.callbacks):
        added.append(ExactResume())
    trainer.callbacks = added + trainer.callbacks


def _own(data: Any, index: int) -> Any:
    """What this member trains on; loaders are copies, whose generators and positions nobody has used."""
    if isinstance(data, LightningDataModule):
        return data
    if callable(data) and not isinstance(data, Iterable):
        return data(index)
    datasets = [getattr(loader, "dataset", None) for loader in tree_leaves(data)]
    try:
        return copy.deepcopy(data, {id(dataset): dataset for dataset in datasets if dataset is not None})
    except Exception as error:
        raise ValueError(
            f"`data` is copied for each member, and that failed ({type(error).__name__}: {error}): give a function of"
            " the index that makes the loaders"
        ) from error


class _AtomicFile(CheckpointIO):
    """Writes a checkpoint with ``torch.save``, whole or not at all, whatever the Trainer's own plugin does."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with write_atomically(path) as beside, open(beside, "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError

    def remove_checkpoint(self, path: Any) -> NoReturn:
        raise NotImplementedError


def _save(trainer: Trainer, path: Path) -> None:
    """Write what the fit ended with; the file is there when this returns, and appears at once, or not at all."""
    strategy, writer = trainer.strategy, trainer.strategy.checkpoint_io
    distributed = isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint
    try:
        if distributed:  # one file, which `load_from_checkpoint` reads, and no folder of shards
            strategy._save_distributed_checkpoint = False
        strategy.checkpoint_io = _AtomicFile()
        trainer.save_checkpoint(path, weights_only=True)
    finally:
        strategy.checkpoint_io = writer
        if distributed:
            strategy._save_distributed_checkpoint = True
