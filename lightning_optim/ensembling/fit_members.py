"""Train the members of an ensemble, one after the other."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_optim.base.arguments import check_number
from lightning_optim.base.shards import reshard_
from lightning_optim.ensembling.member_files import FinishedMembers, LabelCheckpoints, last_checkpoint
from lightning_optim.ensembling.member_functions import MemberMaker
from lightning_optim.resume.exact_resume import ExactResume
from lightning_optim.runtime.callback_state import edit_before_write
from lightning_optim.runtime.files.checkpoint_io import AtomicCheckpointIO, using_checkpoint_io
from lightning_optim.runtime.lightning import (
    LightningDataModule,
    LightningModule,
    ModelCheckpoint,
    Trainer,
    rank_zero_info,
)
from lightning_optim.runtime.lightning.strategies import writing_one_file
from lightning_optim.runtime.lightning.torch_internals import tree_leaves
from lightning_optim.runtime.random_state import isolated_random_state, seed_everything


def fit_members(
    make_member: Callable[[int], LightningModule],
    size: int,
    make_trainer: Callable[[int], Trainer],
    data: Any,
    *,
    dirpath: str | Path,
    seed: int = 0,
    val_dataloaders: Any = None,
) -> list[str]:
    r"""Train several models that differ in their seed, and in all that ``make_member`` changes with the index.

    For each index all random generators are seeded with a number that follows from ``(seed, index)``
    (:func:`~lightning_optim.ensembling.fit_members.member_seed`); then ``make_member(index)``, ``make_trainer(index)``
    and ``trainer.fit`` are called. A member therefore depends on ``(seed, index)`` only: the first members are the same
    for every ``size``, and a larger ``size`` extends an ensemble. The weights at the end of the fit (the average or the
    best weights, if a callback restores them) are written to ``dirpath/member-{index}.ckpt``.

    **A run that was killed** and is called again ends with the same members, bit for bit. Finished members, listed in
    ``dirpath/members.json``, are not trained again unless their checkpoint is damaged. The member that was interrupted
    goes on from the newest checkpoint of its Trainer's ``ModelCheckpoint`` from which a resume is exact, or else starts
    again from its seed. For this :class:`~lightning_optim.ExactResume` is added to each Trainer with a
    ``ModelCheckpoint``, which writes to ``dirpath/member-{index}`` unless it has a ``dirpath`` of its own. Exact are
    checkpoints from the end of an epoch, and from the middle of one if the training loaders save their position (they
    have ``state_dict``, like torchdata's).

    Changes in ``make_member`` and ``make_trainer`` are not noticed: use another ``dirpath`` after one. Under DDP and
    FSDP2 every process calls this function; they must share the file system of ``dirpath``.

    Args:
        make_member: Function from the index to a new model. It may choose another architecture for each index. Models
            may share submodules that no fit changes, or that the function resets each time.
        size: The number of members, at least 1. `Deep Ensembles <https://arxiv.org/abs/1612.01474>`_ uses five. The
            first few gain the most; measure it with :func:`~lightning_optim.cost_benefit`.
        make_trainer: Function from the index to a new Trainer.
        data: The data of ``trainer.fit``: a LightningDataModule, one training loader, a list or a dictionary of them,
            ``None`` for the members' own; or a function from the index to one of these, for members on different data
            (bagging). Loaders are copied for each member, without their data sets, so that a member's order of data
            depends on no other member.
        dirpath: The folder for the members.
        seed: The seed of the ensemble, an integer of at least 0. Default 0. Another seed needs another ``dirpath``.
        val_dataloaders: The validation loader, as for ``trainer.fit``: one or several loaders, or a function from the
            index to them. Default ``None``: those of the LightningDataModule or of the members themselves; without
            either, no validation runs.

    Returns:
        The paths of the members' checkpoints, in order, for ``Ensemble.from_checkpoints``.

    Raises:
        ValueError: If an argument is not allowed, a function does not return a new object for each member, ``dirpath``
            holds members of another seed, or its ``members.json`` is damaged.

    Example::

        >>> from pathlib import Path
        >>> from lightning.pytorch import Trainer
        >>> import tempfile
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> def make_trainer(index):
        ...     return Trainer(max_steps=1, barebones=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = fit_members(lambda index: BoringModel(), 2, make_trainer, None, dirpath=folder)
        ...     [Path(path).name for path in paths]
        ['member-0.ckpt', 'member-1.ckpt']

    With a validation loader, for Trainers with ``EarlyStopping("val_loss")``::

        fit_members(make_member, 5, make_trainer, train_loader, dirpath="members", val_dataloaders=val_loader)
    """
    make = MemberMaker(make_member, make_trainer)
    check_number("size", size, low=1, integer=True)
    check_number("seed", seed, low=0, integer=True)
    finished = FinishedMembers(Path(dirpath), seed)
    missing = [index for index in range(size) if index not in finished]
    rank_zero_info(f"{size - len(missing)} of {size} members are finished in {finished.folder}")
    begin = time.monotonic()
    with _preserved_random_state():
        for done, index in enumerate(missing, 1):
            _fit_member(make, index, (data, val_dataloaders), finished)
            left = len(missing) - done
            rest = f", about {(time.monotonic() - begin) / done * left:.0f} s to go" if left else ""
            rank_zero_info(f"{size - left} of {size} members finished (member {index}){rest}")
    return [str(finished.path(index)) for index in range(size)]


def member_seed(seed: int, index: int) -> int:
    r"""Return the seed of one member: 32 bits, as ``seed_everything`` takes.

    :math:`f((\mathrm{sha256}(\mathrm{seed})_{32} + \mathrm{index}) \bmod 2^{32})`, where ``f`` is the finalizer of
    MurmurHash3. ``f`` is one to one, so no two members of an ensemble share a seed; neighbouring seeds and indices give
    unrelated results, and member 0 does not have the ensemble's seed itself. It depends on no library's version.

    Args:
        seed: The seed of the ensemble.
        index: The index of the member.

    Example::

        >>> [member_seed(0, index) for index in range(3)]
        [3202332595, 171021625, 3110237010]
    """
    x = (int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big") + index) % 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


@contextmanager
def _preserved_random_state() -> Iterator[None]:
    """Context manager: afterwards the random generators, and the seed for loaders' workers, are as before."""
    before = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    try:
        with isolated_random_state():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _fit_member(make: MemberMaker, index: int, data: tuple[Any, Any], finished: FinishedMembers) -> None:
    own_seed = member_seed(finished.seed, index)
    seed_everything(own_seed)
    member, trainer = make(index)
    label = LabelCheckpoints(finished.seed, index)
    _add_callbacks(trainer, label, finished.folder / f"member-{index}")
    label.resume_from = last_checkpoint(trainer, label)
    start = time.monotonic()
    with make.training(member):
        trainer.fit(member, *_data_of(*data, index), ckpt_path=label.resume_from)
        if trainer.state.status != "finished":
            raise RuntimeError(f"The fit of member {index} was interrupted: call `fit_members` again to go on there.")
        reshard_(member)
    path = finished.path(index)
    _save(trainer, path, label)
    if trainer.is_global_zero:
        seconds = round(time.monotonic() - start, 3)
        finished.add(index, seed=own_seed, epochs=trainer.current_epoch, steps=trainer.global_step, seconds=seconds)
    trainer.strategy.barrier("fit_members")


def _add_callbacks(trainer: Trainer, label: LabelCheckpoints, folder: Path) -> None:
    """Add the callbacks that label the Trainer's checkpoints as this member's and make resuming from them exact."""
    added: list[Any] = [label]
    savers = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    for callback in savers:
        if callback.dirpath is None:
            # Lightning would choose a folder by the logger's version, which changes when the run is started again.
            callback.dirpath = str(folder)
    if savers and not any(isinstance(callback, ExactResume) for callback in trainer.callbacks):
        exact = ExactResume()
        exact.warns_at_start = False  # a member resumes from exact checkpoints only
        added.append(exact)
    trainer.callbacks = added + trainer.callbacks


def _data_of(data: Any, val_dataloaders: Any, index: int) -> tuple[Any, Any]:
    """Return the data of a member, and its validation loaders; in this order, since both may draw random numbers."""
    train, val = _own("data", data, index), _own("val_dataloaders", val_dataloaders, index)
    if type(train) is tuple:
        raise ValueError(
            f"`data` must be a LightningDataModule or training loaders, got a tuple of {len(train)}: write"
            " `data=train_loader, val_dataloaders=val_loader` to validate, or `data=[…]`, a list, to train on several"
            " loaders at once"
        )
    if val is not None and isinstance(train, LightningDataModule):
        raise ValueError(
            f"`val_dataloaders` must not be given with `data={type(train).__name__}(…)`, a LightningDataModule: define"
            " its `val_dataloader`"
        )
    return train, val


def _own(name: str, data: Any, index: int) -> Any:
    """Return an argument's loaders for a member; they are copied, so that their generators and positions are unused."""
    if isinstance(data, LightningDataModule):
        return data
    if callable(data) and not isinstance(data, Iterable):
        return data(index)
    datasets = [getattr(loader, "dataset", None) for loader in tree_leaves(data)]
    try:
        return copy.deepcopy(data, {id(dataset): dataset for dataset in datasets if dataset is not None})
    except Exception as error:
        raise ValueError(
            f"`{name}` is copied for each member, and that failed ({type(error).__name__}: {error}): pass a function"
            " from the index to the loaders."
        ) from error


def _save(trainer: Trainer, path: Path, label: LabelCheckpoints) -> None:
    """Write a checkpoint with the weights at the end of the fit; it is complete when this returns."""
    strategy = trainer.strategy
    # `load_from_checkpoint` reads a file, and no folder of shards.
    with writing_one_file(strategy), using_checkpoint_io(strategy, AtomicCheckpointIO()):
        edit_before_write(strategy, lambda checkpoint: checkpoint.update(label.finished_member()))
        trainer.save_checkpoint(path, weights_only=True)  # which asks no callback for what it adds
