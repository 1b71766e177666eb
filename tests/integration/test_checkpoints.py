"""What is in a checkpoint: the weights that were validated, for whoever reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStopping as LightningEarlyStopping

from lightning_optim import EMA, EarlyStopping, WeightAveraging
from tests.harness import models
from tests.harness.cells import EPOCHS, Cell
from tests.harness.process_group import Group
from tests.harness.run import fsdp2
from tests.integration.entry_fits import KeepsHistory, choice_for, differences, each_entry, fit, prepare
from tests.registry import BY_NAME, Entry

STEPS = Cell("automatic", "32-true", "single", "1")
"""Steps between all validations, so that Lightning writes a file after each."""

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using")


class Watching:
    """Keeps the weights that each validation sees, and those with which training begins."""

    def on_validation_start(self: Any) -> None:
        vars(self).setdefault("watched", []).append(models.full_weights(self))

    def on_train_start(self: Any) -> None:
        self.began_with = models.full_weights(self)


def saver(folder: Path, **options: Any) -> ModelCheckpoint:
    # One after each validation, in the order of their names.
    return ModelCheckpoint(folder, "{step:03d}", save_top_k=-1, save_on_train_epoch_end=False, **options)


@each_entry
@pytest.mark.parametrize("weights_only", [False, True])
def test_each_file_holds_what_was_validated(entry: Entry, weights_only: bool, tmp_path: Path) -> None:
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
def test_a_trainer_with_our_callbacks_resumes_a_plain_file(entry: Entry, tmp_path: Path) -> None:
    """A technique that is new in the middle of a run begins there, with the weights of the file."""
    fit(BY_NAME["plain"], STEPS, callbacks=[], extra=(saver(tmp_path),), enable_checkpointing=True)
    path = min(tmp_path.glob("*.ckpt"))
    resumed = fit(entry, STEPS, Watching, ckpt_path=path)
    assert not differences(resumed.module.began_with, dict(torch.load(path, weights_only=True)["state_dict"]))
    assert all(callback.steps == [resumed.trainer.global_step] for callback in resumed.ours)


def sharded(name: str, folder: Path, distributed: bool) -> Any:
    """A job: the best file of a fit under FSDP2, validated in a new Trainer with and without the callbacks."""
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
def test_sharded_files(entry: Entry, group: Group, tmp_path: Path) -> None:
    distributed = choice_for(entry, True, False)
    for score, values, folder in group.run(sharded, entry.name, tmp_path, distributed):
        assert folder == distributed
        assert values == pytest.approx([score] * 3, rel=1e-6)


class Exporting:
    """Saves at the end of a batch, and keeps its weights in `on_save_checkpoint` and the average of that moment."""

    path: Any = None
    exported: Any = None

    def on_train_batch_end(self: Any, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        if self.path and self.seen == 7:
            average = next(callback for callback in self.trainer.callbacks if isinstance(callback, WeightAveraging))
            with average.averaged_weights(self):
                self.average = models.full_weights(self)
            self.trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.exported = models.full_weights(self)


def exported(path: Path, distributed: bool) -> Any:
    """A job: what a sharded module holds while it is saved, and whether training goes on as without."""
    cell, ends = Cell("automatic", "32-true", "fsdp2", "1"), []
    for target in (None, path):
        fitted = prepare(BY_NAME["ema"], cell, Exporting, KeepsHistory, strategy=fsdp2(distributed))
        fitted.module.path = target
        fitted.trainer.fit(fitted.module)
        ends.append((fitted.outcome.raw, fitted.outcome.final, fitted.outcome.validations))
    return fitted.module.exported, fitted.module.average, ends


@pytest.mark.parametrize("distributed", [True, False])
def test_a_sharded_module_holds_the_average_while_it_is_saved(distributed: bool, group: Group, tmp_path: Path) -> None:
    for weights, average, (alone, saving) in group.run(exported, tmp_path / "one.ckpt", distributed):
        assert not differences(weights, average)
        assert differences(weights, alone[0]), "nothing to tell apart"
        assert not differences(alone, saving)
    resumed = group.run(resumed_from, tmp_path / "one.ckpt")
    assert not differences(resumed, [saving] * 2)


def resumed_from(path: Path) -> Any:
    """A job: the end of a run that goes on from a file."""
    cell = Cell("automatic", "32-true", "fsdp2", "1")
    outcome = fit(BY_NAME["ema"], cell, KeepsHistory, ckpt_path=path).outcome
    return outcome.raw, outcome.final, outcome.validations


# ---- Lightning's own early stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "then"), [(LightningEarlyStopping, EarlyStopping), (EarlyStopping, LightningEarlyStopping)]
)
def test_early_stopping_is_lightnings(first: Any, then: Any, tmp_path: Path) -> None:
    """A checkpoint of the one resumes in the other: the same checks were waited for, and the stop is where it was."""
    stop = BY_NAME["stop"]
    whole = fit(stop, STEPS, KeepsHistory, callbacks=[first("val_score", patience=2)])
    extra = (saver(tmp_path),)
    fit(stop, STEPS, KeepsHistory, callbacks=[first("val_score", patience=2)], extra=extra, enable_checkpointing=True)
    path = sorted(tmp_path.glob("*.ckpt"))[3]  # after a check without improvement; one more is one too many
    resumed = fit(stop, STEPS, KeepsHistory, callbacks=[then("val_score", patience=2)], ckpt_path=path)
    assert whole.module.seen == resumed.module.seen == 10
    (one,), (other,) = whole.callbacks[:1], resumed.callbacks[:1]
    assert float(one.best_score) == float(other.best_score) == 2.0
    assert (one.wait_count, one.stopped_epoch) == (other.wait_count, other.stopped_epoch)


def test_arguments_of_now_win_over_the_file(tmp_path: Path) -> None:
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
    assert resumed.module.seen == 12, "one check more than with the patience of the file"
    assert patient.best_score == 2.0, "the state of the file was not found"
    assert slower.steps == [12]
    assert slower.average.decay == 0.5
