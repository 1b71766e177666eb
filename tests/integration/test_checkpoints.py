"""Checkpoints hold the weights that were validated: for this package, for Lightning alone, and for other callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import EMA, EarlyStopping, WeightAveraging
from tests.harness import models
from tests.harness.cells import EPOCHS, Cell
from tests.harness.process_group import Group
from tests.harness.run import fsdp2
from tests.integration.entry_fits import KeepsHistory, choice_for, differences, each_entry, each_entry_by, fit, prepare
from tests.lightning import ModelCheckpoint
from tests.registry import BY_NAME, Entry, refused

STEPS = Cell("automatic", "32-true", "single", "1")
"""Steps between all validations, so that Lightning writes a checkpoint after each."""

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using")


class Watching:
    """Trait: keep the weights of each validation, and those at the start of training."""

    def on_validation_start(self: Any) -> None:
        vars(self).setdefault("watched", []).append(models.full_weights(self))

    def on_train_start(self: Any) -> None:
        self.began_with = models.full_weights(self)


def saver(folder: Path, **options: Any) -> ModelCheckpoint:
    # One checkpoint after each validation; their names sort in this order.
    return ModelCheckpoint(folder, "{step:03d}", save_top_k=-1, save_on_train_epoch_end=False, **options)


@each_entry_by("weights_only", False, True)
def test_each_checkpoint_holds_the_validated_weights(entry: Entry, weights_only: bool, tmp_path: Path) -> None:
    extra = (saver(tmp_path, save_weights_only=weights_only),)
    fitted = fit(entry, STEPS, Watching, extra=extra, enable_checkpointing=True)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == len(fitted.module.watched) >= 4
    for path, seen in zip(files, fitted.module.watched, strict=True):
        saved = torch.load(path, weights_only=True)
        assert ("callbacks" in saved) != weights_only
        assert not differences(dict(saved["state_dict"]), seen)
        loaded = models.Model.load_from_checkpoint(path, cell=STEPS, weights_only=True)
        assert not differences(models.full_weights(loaded), seen)


@each_entry
def test_a_trainer_without_our_callbacks_resumes(entry: Entry, tmp_path: Path) -> None:
    fit(entry, STEPS, extra=(saver(tmp_path),), enable_checkpointing=True)
    path = min(tmp_path.glob("*.ckpt"))
    resumed = fit(BY_NAME["plain"], STEPS, Watching, callbacks=[], ckpt_path=path)
    assert not differences(resumed.module.began_with, dict(torch.load(path, weights_only=True)["state_dict"]))
    assert resumed.module.seen == EPOCHS * STEPS.batches - 2


@each_entry
@pytest.mark.filterwarnings("ignore:This resume is not exact. the checkpoint was written without")
def test_a_trainer_with_our_callbacks_resumes_a_plain_checkpoint(entry: Entry, tmp_path: Path) -> None:
    """A technique that is added in the middle of a run begins there, with the weights of the checkpoint."""
    fit(BY_NAME["plain"], STEPS, callbacks=[], extra=(saver(tmp_path),), enable_checkpointing=True)
    path = min(tmp_path.glob("*.ckpt"))
    resumed = fit(entry, STEPS, Watching, ckpt_path=path)
    assert not differences(resumed.module.began_with, dict(torch.load(path, weights_only=True)["state_dict"]))
    assert all(callback.steps == [resumed.trainer.global_step] for callback in resumed.ours)


def sharded(name: str, folder: Path, distributed: bool) -> Any:
    """Fit under FSDP2, and validate the best checkpoint in a new Trainer, with and without the callbacks; a job."""
    cell = Cell("automatic", "32-true", "fsdp2", "1")
    entry = BY_NAME[name]

    best = ModelCheckpoint(folder, monitor="val_loss", save_on_train_epoch_end=False)
    fitted = fit(entry, cell, extra=(best,), enable_checkpointing=True, strategy=fsdp2(distributed))
    values = [fitted.trainer.validate(fitted.module, ckpt_path=best.best_model_path, verbose=False)[0]["val_loss"]]
    for callbacks in (entry.all_callbacks(cell), []):
        other = prepare(entry, cell, callbacks=callbacks, strategy=fsdp2(distributed))
        values += [other.trainer.validate(other.module, ckpt_path=best.best_model_path, verbose=False)[0]["val_loss"]]
    return float(best.best_model_score), values, Path(best.best_model_path).is_dir()


@each_entry
def test_sharded_checkpoints(entry: Entry, group: Group, tmp_path: Path) -> None:
    distributed = choice_for(entry, True, False)
    if refused(entry, (0,), lambda: group.run(sharded, entry.name, tmp_path, distributed)):
        return
    for score, values, folder in group.run(sharded, entry.name, tmp_path, distributed):
        assert folder == distributed
        assert values == pytest.approx([score] * 3, rel=1e-6)


def test_arguments_win_over_those_in_the_checkpoint(tmp_path: Path) -> None:
    stop = BY_NAME["stop"]
    options: dict[str, Any] = {"extra": (saver(tmp_path),), "enable_checkpointing": True}
    fit(
        stop,
        STEPS,
        KeepsHistory,
        callbacks=[EarlyStopping("val_score", patience=2), WeightAveraging(EMA(0.9))],
        **options,
    )
    path = sorted(tmp_path.glob("*.ckpt"))[2]
    patient, slower = EarlyStopping("val_score", patience=3), WeightAveraging(EMA(0.5))
    resumed = fit(stop, STEPS, KeepsHistory, callbacks=[patient, slower], ckpt_path=path)
    assert resumed.module.seen == 12, "one validation more than with the patience in the checkpoint"
    assert patient.best_score == 2.0, "the state in the checkpoint was not found"
    assert slower.steps == [12]
    assert slower.average.decay == 0.5
