"""Paths that come from a loaded checkpoint: only files that this run wrote are unpickled."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import EMA, CheckpointAveraging, WeightAveraging
from lightning_optim.runtime.files.own_files import OwnFiles
from tests.averaging.models import Model, assert_equal, data, snapshot, trainer
from tests.averaging.test_average_checkpoints import Scripted
from tests.lightning import Callback, ModelCheckpoint, supported

VALUES = [9.0, 4.0, 1.0, 2.0]


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


class Keep(Callback):
    """A callback that saves a checkpoint to resume from, two epochs before the last."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def _callbacks(folder: Path, top: int = 2) -> tuple[ModelCheckpoint, CheckpointAveraging]:
    saved = ModelCheckpoint(folder, monitor="val_loss", save_top_k=top, filename="{epoch}")
    return saved, CheckpointAveraging(top=top)


def _run(folder: Path, *more: Callback, target: float = 2.6, resume: Path | None = None, **changes: Any) -> Any:
    model, (saved, callback) = Scripted(VALUES, target), _callbacks(folder)
    run = trainer([saved, callback, *more], enable_checkpointing=True, max_epochs=len(VALUES), **changes)
    run.fit(model, ckpt_path=resume)
    return model, callback


@pytest.fixture
def resumed_from(tmp_path: Path) -> Any:
    """Make a checkpoint in which the best path of the ModelCheckpoint is a foreign file."""

    def make(content: Any) -> tuple[Path, Path, Path]:
        folder, point, strange = tmp_path / "run", tmp_path / "point.ckpt", tmp_path / "strange.ckpt"
        _run(folder, Keep(point))
        torch.save(content, strange) if not isinstance(content, bytes) else strange.write_bytes(content)
        checkpoint = torch.load(point, weights_only=True)
        (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
        other, score = next(iter(state["best_k_models"].items()))
        best = torch.tensor(-5.0)
        state.update(best_k_models={str(strange): best, other: score}, best_model_path=str(strange))
        state.update(best_model_score=best, kth_best_model_path=other, kth_value=score)
        torch.save(checkpoint, point)
        return folder, point, strange

    return make


def test_a_foreign_pickle_is_not_run(resumed_from, tmp_path: Path) -> None:
    state = Scripted(VALUES, 0.0).state_dict()
    folder, point, strange = resumed_from({"state_dict": state, "more": Harmful(tmp_path / "made")})
    with pytest.warns(UserWarning, match=r"strange\.ckpt holds more than tensors and plain values") as said:
        model, callback = _run(folder, resume=point)
    assert not (tmp_path / "made").exists()
    assert [str(strange) in str(one.message) for one in said if "CheckpointAv" in str(one.message)] == [True, True]
    assert model.net.weight.item() == VALUES[-1]  # the run ends with what it has
    assert callback.best_path == ""


def test_the_average_is_next_where_the_best_cannot_be_read(resumed_from) -> None:
    folder, point, _ = resumed_from(b"no checkpoint")
    average = WeightAveraging(EMA(0.5, warmup=None))
    with pytest.warns(UserWarning, match=r"strange\.ckpt is no checkpoint"):
        model, _ = _run(folder, average, resume=point)
    with average.averaged_weights(model):
        averaged = snapshot(model)
    assert_equal(snapshot(model), averaged)
    assert model.net.weight.item() != VALUES[-1]


@pytest.mark.parametrize("content", [{"weights": 1}, {"state_dict": {"net.weight": torch.ones(3, 3)}}], ids=str)
def test_a_file_of_another_model_changes_nothing(content, resumed_from) -> None:
    folder, point, _ = resumed_from(content)
    with pytest.warns(UserWarning, match="leaves the module as it is"):
        model, _ = _run(folder, resume=point)
    assert model.net.weight.item() == VALUES[-1]


def test_a_foreign_file_of_tensors_is_read(resumed_from) -> None:
    model = Scripted(VALUES, 0.0)
    torch.nn.init.constant_(model.net.weight, 2.6)
    folder, point, strange = resumed_from({"state_dict": model.state_dict()})
    model, callback = _run(folder, resume=point)
    assert callback.best_path == str(strange)
    assert model.net.weight.item() == pytest.approx(2.6)


class Parameterized(Scripted):
    """A model whose hyperparameters are objects, which only a trusted checkpoint may contain."""

    def __init__(self, values: list[float], target: float) -> None:
        super().__init__(values, target)
        self.save_hyperparameters({"root": Path("/somewhere")})


def test_what_the_run_wrote_itself_may_hold_objects(tmp_path: Path) -> None:
    saved, callback = _callbacks(tmp_path)
    model = Parameterized(VALUES, 2.6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "CheckpointAveraging")
        trainer([saved, callback], enable_checkpointing=True, max_epochs=len(VALUES)).fit(model)
    assert model.net.weight.item() == pytest.approx(3.0)  # the mean of 4 and 2
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(saved.best_model_path, weights_only=True)


def test_a_resumed_run_reads_the_weights_beside_objects(tmp_path: Path) -> None:
    """Of the two checkpoints in the mean, with the weights 4 and 2, the resumed run has written only the second."""
    for epochs, resume in ((2, None), (len(VALUES), tmp_path / "latest.ckpt")):
        model, (saved, callback) = Parameterized(VALUES, 2.6), _callbacks(tmp_path / "run")
        latest = ModelCheckpoint(tmp_path, filename="latest", enable_version_counter=False)
        run = trainer([saved, latest, callback], enable_checkpointing=True, max_epochs=epochs)
        run.fit(model, ckpt_path=resume, **supported(run.fit, weights_only=False))
    assert [Path(path).name for path in callback.kept] == ["epoch=3.ckpt", "epoch=1.ckpt"]
    assert model.net.weight.item() == pytest.approx(3.0)


def test_own_files_are_those_written_in_this_fit(tmp_path: Path) -> None:
    written = {}

    class Look(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            own = average.fit.own_files
            written.update({name: str(tmp_path / name) in own for name in ("one.ckpt", "link.ckpt", "other.ckpt")})

    average = WeightAveraging(EMA(0.9))
    (tmp_path / "other.ckpt").write_bytes(b"")
    (tmp_path / "link.ckpt").symlink_to("one.ckpt")
    run = trainer([average, Look(), ModelCheckpoint(tmp_path, filename="one")], enable_checkpointing=True, max_epochs=1)
    run.fit(Model(), data(2), data(2))
    assert written == {"one.ckpt": True, "link.ckpt": True, "other.ckpt": False}
    assert "save_checkpoint" not in vars(run.strategy)


def test_a_renamed_file_is_still_trusted() -> None:
    own = OwnFiles()
    own.add("s3://bucket/a.ckpt")
    own.rename("s3://bucket/b.ckpt", "s3://bucket/c.ckpt")
    own.rename("s3://bucket/a.ckpt", "s3://bucket/d.ckpt")
    names = [name for name in "abcd" if f"s3://bucket/{name}.ckpt" in own]
    assert names == ["d"]
