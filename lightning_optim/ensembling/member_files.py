"""Keep the files of an ensemble's members: the list of finished ones, and checkpoints to resume the others from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_optim.ensembling.file_entries import MEMBER_KEY
from lightning_optim.resume.exactness_checks import resumes_exactly_from_here
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.files.atomic_writing import write_atomically
from lightning_optim.runtime.files.safe_reading import check, first_line, load
from lightning_optim.runtime.lightning import (
    CallbackBase,
    LightningModule,
    MisconfigurationException,
    ModelCheckpoint,
    Trainer,
    rank_zero_warn,
)
from lightning_optim.runtime.session import Session


class FinishedMembers:
    """Keep ``members.json``: the ensemble's seed, and the seed, file and duration of each finished member.

    Args:
        folder: The folder with the members.
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
                    f"`seed={seed}` is not the seed of the members in {folder}, {written['seed']}: pass that seed to go"
                    " on with them, or another `dirpath`."
                )
            self._finished = {entry["index"]: entry for entry in written["members"]}

    def _read(self) -> dict[str, Any]:
        try:
            written = json.loads(self.file.read_bytes())
            indices = [entry["index"] for entry in written["members"]]
            if not all(map(_is_count, [written["seed"], *indices])) or len(set(indices)) < len(indices):
                raise ValueError("its seed or an index is not a count, or an index is there twice")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{self.file} is damaged or is not a list of members ({type(error).__name__}: {error}): delete it to"
                " train the members again, each from its last checkpoint, or pass another `dirpath`."
            ) from error
        return dict(written)

    def path(self, index: int) -> Path:
        """Return the path of a member's checkpoint."""
        return self.folder / f"member-{index}.ckpt"

    def __contains__(self, index: int) -> bool:
        """Return True if a member is finished: it is in the list, and its checkpoint is not damaged."""
        if index not in self._finished or not self.path(index).exists():
            return False
        try:
            check(self.path(index), weights_only=False)  # hyper-parameters may be anything; nothing is unpickled here
        except ValueError as error:
            rank_zero_warn(f"{error}: member {index} is trained again.")
            return False
        return True

    def add(self, index: int, **about: Any) -> None:
        """Add a member whose checkpoint is written. A kill leaves the old list or the new one."""
        self._finished[index] = {"index": index, "file": self.path(index).name, **about}
        members = [self._finished[known] for known in sorted(self._finished)]
        with write_atomically(self.file) as beside, open(beside, "w") as file:
            json.dump({"seed": self.seed, "members": members}, file, indent=1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class LabelCheckpoints(CallbackBase):
    """Label a Trainer's checkpoints with the member they belong to, and with whether a resume from them is exact.

    Args:
        seed: The seed of the ensemble.
        index: The member's index.

    Attributes:
        resume_from: The checkpoint from which this fit goes on.
        weights_of: The callback of this package that wrote the weights that the member holds after its fit.
    """

    def __init__(self, seed: int, index: int) -> None:
        self.seed, self.index = seed, index
        self.resume_from: Path | None = None
        self.weights_of: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        mine = [self.index, self.resume_from and str(self.resume_from)]
        if not trainer.strategy.reduce_boolean_decision(mine == trainer.strategy.broadcast(mine), all=True):
            raise MisconfigurationException(
                "The processes of `fit_members` see different files: `dirpath`, and the folder of a ModelCheckpoint,"
                " must be on a file system that all of them share."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ours = (callback.fit for callback in trainer.callbacks if isinstance(callback, OptimCallback))
        session = next((session for session in ours if session is not None), None)
        if session is not None:
            session.on_close(lambda: self._remember_writer(session))

    def _remember_writer(self, session: Session) -> None:
        writer: Any = session.wrote_final
        self.weights_of = None if writer is None else writer.brief

    def finished_member(self) -> dict[str, Any]:
        """Return what the checkpoint of the finished member holds beside its weights. No resume begins from it."""
        return {MEMBER_KEY: {"seed": self.seed, "index": self.index, "weights_of": self.weights_of}}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[MEMBER_KEY] = {"seed": self.seed, "index": self.index, "exact": resumes_exactly_from_here(trainer)}

    def accepts(self, checkpoint: Any) -> bool:
        """Return True if a checkpoint is this member's, and a resume from it is exact."""
        label = {"seed": self.seed, "index": self.index, "exact": True}
        return isinstance(checkpoint, dict) and checkpoint.get(MEMBER_KEY) == label


def last_checkpoint(trainer: Trainer, label: LabelCheckpoints) -> Path | None:
    """Return the newest checkpoint of the Trainer's ModelCheckpoints that is this member's and resumes exactly."""
    folders = {cb.dirpath for cb in trainer.callbacks if isinstance(cb, ModelCheckpoint) and cb.dirpath is not None}
    found: list[tuple[int, str, Path]] = []
    for path in sorted(path for folder in folders for path in Path(folder).glob("*.ckpt")):
        head = path / "meta.pt" if path.is_dir() else path  # a distributed checkpoint is a folder
        try:
            checkpoint = load(head, check=False)
        except Exception as error:
            _warn_of(path, error)
            continue
        if label.accepts(checkpoint):
            found.append((checkpoint["global_step"], path.name, path))
    # Checksums are slow, since they read the whole file: check the newest one, and an older one only if it is damaged.
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
    rank_zero_warn(f"{path} cannot be read, and is skipped: {first_line(error)}")
