"""What a folder of members holds: which are finished, which seed each has, and where an unfinished one may go on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lightning_optim.resume.exactness import resumes_exactly_from_here
from lightning_optim.runtime.files.atomic_writing import write_atomically
from lightning_optim.runtime.files.safe_reading import check, first_line, load
from lightning_optim.runtime.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    ModelCheckpoint,
    Trainer,
    rank_zero_warn,
)

_KEY = "fit_members"


def member_seed(seed: int, index: int) -> int:
    r"""The seed of member ``index`` of the ensemble with this ``seed``: 32 bits, as ``seed_everything`` takes.

    :math:`f((\mathrm{sha256}(\mathrm{seed})_{32} + \mathrm{index}) \bmod 2^{32})` with the finalizer of MurmurHash3 as
    ``f``. It is one to one, so no two members of an ensemble share a seed; near seeds and indices give far results, and
    member 0 does not have the seed itself. It depends on no library's version.

    Example::

        >>> [member_seed(0, index) for index in range(3)]
        [3202332595, 171021625, 3110237010]
    """
    x = (int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big") + index) % 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


class FinishedMembers:
    """``members.json``: the seed, and for each finished member its seed, file, epochs, steps and seconds.

    Args:
        folder: Where the members are.
        seed: The seed of the ensemble.

    Raises:
        ValueError: If the folder holds members of another seed, or ``members.json`` is damaged.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.file = folder / "members.json"
        self._finished: dict[int, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            written = self._read()
            if written["seed"] != seed:
                raise ValueError(
                    f"`seed={seed}`, but {folder} holds members of seed {written['seed']}: give that seed to go on with"
                    " them, or another `dirpath`"
                )
            self._finished = {entry["index"]: entry for entry in written["members"]}

    def _read(self) -> dict[str, Any]:
        try:
            written = json.loads(self.file.read_bytes())
            indices = [entry["index"] for entry in written["members"]]
            if not all(map(_is_count, [written["seed"], *indices])) or len(set(indices)) < len(indices):
                raise ValueError("its seed and indices are no counts, or one is there twice")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{self.file} is no list of members, or only a part of one ({type(error).__name__}: {error}): delete"
                " it, and the members are trained again, each from its last checkpoint; or give another `dirpath`"
            ) from error
        return dict(written)

    def path(self, index: int) -> Path:
        """The file of a member."""
        return self.folder / f"member-{index}.ckpt"

    def __contains__(self, index: int) -> bool:
        """Return whether a member is finished: the manifest says so, and its file is whole."""
        if index not in self._finished or not self.path(index).exists():
            return False
        try:
            check(self.path(index), weights_only=False)  # hyper-parameters may be anything; nothing is unpickled here
        except ValueError as error:
            rank_zero_warn(f"{error}: member {index} is trained again")
            return False
        return True

    def add(self, index: int, **about: Any) -> None:
        """A member is finished, and its file written. The manifest appears whole, or stays as it was."""
        name = self.path(index).name
        self._finished[index] = {"index": index, "seed": member_seed(self.seed, index), "file": name, **about}
        members = [self._finished[known] for known in sorted(self._finished)]
        with write_atomically(self.file) as beside, open(beside, "w") as file:
            json.dump({"seed": self.seed, "members": members}, file, indent=1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class CheckpointLabel(Callback):
    """Marks a Trainer's checkpoints with the member that they are of, and with whether a resume from them is exact.

    Args:
        seed: The seed of the ensemble.
        index: The member.

    Attributes:
        resumes: The file from which this fit goes on.
    """

    def __init__(self, seed: int, index: int) -> None:
        self.seed, self.index = seed, index
        self.resumes: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        mine = [self.index, self.resumes and str(self.resumes)]
        if not trainer.strategy.reduce_boolean_decision(mine == trainer.strategy.broadcast(mine), all=True):
            raise MisconfigurationException(
                "The processes of `fit_members` see different files: `dirpath`, and the folder of a ModelCheckpoint,"
                " must be on a file system that all of them share."
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = {"seed": self.seed, "index": self.index, "exact": resumes_exactly_from_here(trainer)}

    def marks(self, checkpoint: Any) -> bool:
        """Whether a file is this member's, and a run that goes on from it ends as one that was never killed."""
        mark = {"seed": self.seed, "index": self.index, "exact": True}
        return isinstance(checkpoint, dict) and checkpoint.get(_KEY) == mark


def last_checkpoint(trainer: Trainer, mark: CheckpointLabel) -> Path | None:
    """The newest file of the Trainer's ModelCheckpoints that is this member's and from which a resume is exact."""
    folders = {cb.dirpath for cb in trainer.callbacks if isinstance(cb, ModelCheckpoint) and cb.dirpath is not None}
    found: list[tuple[int, str, Path]] = []
    for path in sorted(path for folder in folders for path in Path(folder).glob("*.ckpt")):
        head = path / "meta.pt" if path.is_dir() else path  # a distributed checkpoint is a folder
        try:
            checkpoint = load(head, check=False)
        except Exception as error:
            _warn_of(path, error)
            continue
        if mark.marks(checkpoint):
            found.append((checkpoint["global_step"], path.name, path))
    # Reading whole files is dear: the checksums of the newest are compared, and of an older one if it is damaged.
    return next((path for *_, path in sorted(found, reverse=True) if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    try:
        if path.is_file():
            check(path)
    except ValueError as error:
        _warn_of(path, error)
        return False
    return True


def _warn_of(path: Path, error: Exception) -> None:
    rank_zero_warn(f"{path} cannot be read, and is passed over ({first_line(error)})")
