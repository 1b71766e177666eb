"""An ensemble that was saved, and a folder of two members: one is finished, the other was under way.

* ``ensemble.ckpt.xz``, ``ensemble.end.xz``: what ``trainer.save_checkpoint`` wrote of it, and what it predicted.
* ``members.tar.xz``: the folder of ``fit_members`` when the second member's fit was killed.
* ``members.end.xz``: what the members' files held when it had been called again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_optim import EMA, Ensemble, WeightAveraging, fit_members
from tests.data.first_version import runs
from tests.data.first_version.cases import AFTER
from tests.data.first_version.models import VALIDATE_EVERY, Batch, Member, RandomModel, make_batches
from tests.lightning import ModelCheckpoint, Trainer

SEED = 3
OF_ENSEMBLE = {"outputs": "logits", "on": "net", "dim": 1}


class TrainedMember(RandomModel):
    """Tells how many micro-batches were trained in this process, those of an earlier one left out."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.trained = index, 0
        with torch.no_grad():
            self.net.outer.weight.normal_()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.trained += 1
        return super().training_step(batch, batch_idx)


def fit(folder: Path, kill: bool = False) -> dict[int, int]:
    """Train two members, the second up to the moment at which it is killed; the micro-batches of each."""
    members: list[TrainedMember] = []

    def make_member(index: int) -> TrainedMember:
        members.append(TrainedMember(index))
        return members[-1]

    def make_trainer(index: int) -> Trainer:
        callbacks: list[Any] = [WeightAveraging(EMA(0.8)), ModelCheckpoint(every_n_train_steps=AFTER - 2)]
        if kill and index == 1:
            callbacks.append(runs.Moment(AFTER, enough))
        arguments = dict(accelerator="cpu", devices=1, logger=False, num_sanity_val_steps=0)
        quiet = dict(enable_progress_bar=False, enable_model_summary=False)
        return Trainer(callbacks=callbacks, max_epochs=3, val_check_interval=VALIDATE_EVERY, **arguments, **quiet)

    def enough(*_: Any) -> None:
        raise runs.Enough

    try:
        fit_members(make_member, 2, make_trainer, None, dirpath=folder, seed=SEED)
    except runs.Enough:
        assert kill
    return {member.index: member.trained for member in members}


def held(folder: Path) -> dict[str, Any]:
    """Return the contents of the members' checkpoints."""
    return {
        path.stem: torch.load(path, weights_only=True)["state_dict"] for path in sorted(folder.glob("member-*.ckpt"))
    }


def under_way(folder: Path) -> Path:
    """The file from which the second member goes on."""
    (path,) = (folder / "member-1").glob("*.ckpt")
    return path


def write_members() -> dict[str, Any]:
    """Write the folder, without what Lightning's ``ModelCheckpoint`` holds; what it is when the rest is trained."""
    folder = Path("members")
    fit(folder, kill=True)
    path = under_way(folder)
    checkpoint = torch.load(path, weights_only=True)
    ours = {key: state for key, state in checkpoint["callbacks"].items() if "best_k_models" not in state}
    torch.save(checkpoint | {"callbacks": ours}, path)
    shutil.rmtree(folder / "member-0")  # it is finished
    shutil.make_archive(str(runs.HERE / "members"), "xztar", folder)
    trained = fit(folder)
    assert trained.keys() == {1} and trained[1] < AFTER, trained
    fit(Path("whole"))
    assert not (wrong := runs.differences(held(folder), held(Path("whole")))), wrong
    return {"held": held(folder), "trained": trained}


def unpack_members(folder: Path) -> dict[str, Any]:
    """Put the folder of members into a folder; what it was when the rest had been trained."""
    shutil.unpack_archive(runs.HERE / "members.tar.xz", folder, filter="data")
    return runs.unpack_end("members")


def predictions(ensemble: Ensemble) -> list[Tensor]:
    """Return the predictions of an ensemble and of its members."""
    x, _ = make_batches(1, 20, (16,))[0]
    with torch.no_grad():
        return [ensemble(x), *(member(x) for member in ensemble.members)]


def write_ensemble() -> dict[str, Any]:
    """Write an ensemble that was validated; what it predicts."""
    made = Ensemble([Member(seed=5, scale=2.0), Member(seed=6, scale=0.5)], **OF_ENSEMBLE)
    arguments = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer = Trainer(enable_progress_bar=False, enable_model_summary=False, **arguments)
    (validated,) = trainer.validate(made, verbose=False)
    trainer.save_checkpoint("ensemble.ckpt")
    again = load_ensemble(Path("ensemble.ckpt"))
    assert not runs.differences(predictions(again), predictions(made))
    return {"predictions": predictions(made), "validated": validated}


def load_ensemble(path: Path) -> Ensemble:
    return Ensemble.load_from_checkpoint(path, member_class=Member)
