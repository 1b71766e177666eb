"""CheckpointAveraging where checkpoints were removed or replaced, and beside a ModelCheckpoint that a package adds."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import CheckpointAveraging, EarlyStopping, average_checkpoints
from tests.averaging.models import Model, assert_close, assert_equal, data, fit, snapshot, trainer, two_processes
from tests.averaging.test_checkpoint_averaging import Scripted
from tests.harness.cells import Cell
from tests.harness.models import build, full_weights
from tests.harness.process_group import Group
from tests.lightning import AsyncCheckpointIO, Callback, ModelCheckpoint, TorchCheckpointIO

VALUES = [1.0, 2.0, 4.0, 8.0]  # the weight after each epoch, which is also its score


class Meddles(Callback):
    """Changes checkpoints when training ends."""

    def __init__(self, change: Callable[[list[Path]], Any]) -> None:
        self.change = change

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (saved,) = (one for one in trainer.callbacks if isinstance(one, ModelCheckpoint))
        if trainer.is_global_zero:
            self.change(sorted(map(Path, saved.best_k_models)))
        trainer.strategy.barrier()


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace_by_folder(path: Path) -> None:
    """As the callbacks of some packages do, which save a model of their own in the place of a checkpoint."""
    path.unlink()
    path.mkdir()
    torch.save({}, path / "model.pt")


def run(folder: Path, *others: Callback, keep: int = 3) -> tuple[Any, CheckpointAveraging, list[str]]:
    """Return the module, the callback, and what it warned of."""
    module, ours = Scripted(VALUES, 0.0), CheckpointAveraging(top=3)
    saved = ModelCheckpoint(folder, monitor="val_loss", save_top_k=keep, filename="{epoch}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer([*others, ours, saved], max_epochs=4, enable_checkpointing=True).fit(module, data(1), data(1))
    return module, ours, [str(one.message) for one in caught if "CheckpointAveraging" in str(one.message)]


@pytest.mark.parametrize(("spoil", "why"), [(remove, "is not there"), (replace_by_folder, "is a folder now")])
def test_a_checkpoint_that_cannot_be_read_is_left_out(tmp_path: Path, spoil: Any, why: str) -> None:
    module, ours, said = run(tmp_path, Meddles(lambda paths: spoil(paths[0])))
    assert [f"epoch=0.ckpt {why}" in sentence for sentence in said] == [True]
    assert [Path(path).name for path in ours.kept] == ["epoch=1.ckpt", "epoch=2.ckpt"]
    assert ours.score == 3.0 and Path(ours.best_path).name == "epoch=1.ckpt"
    assert module.net.weight.item() == 2.0


def test_the_next_best_takes_its_place(tmp_path: Path) -> None:
    _, ours, (_,) = run(tmp_path, Meddles(lambda paths: remove(paths[1])), keep=-1)
    assert [Path(path).name for path in ours.kept] == ["epoch=0.ckpt", "epoch=2.ckpt", "epoch=3.ckpt"]


def test_of_a_single_one_nothing_is_averaged(tmp_path: Path) -> None:
    module, ours, (_,) = run(tmp_path, Meddles(lambda paths: [remove(path) for path in paths[:2]]))
    assert (ours.kept, ours.path, Path(ours.best_path).name) == ([], "", "epoch=2.ckpt")
    assert module.net.weight.item() == 4.0


@pytest.mark.parametrize(
    "others", [(), (EarlyStopping("val_loss", patience=math.inf),)], ids=["alone", "with EarlyStopping"]
)
def test_without_any_the_weights_stay(tmp_path: Path, others: Any) -> None:
    module, ours, said = run(tmp_path, Meddles(lambda paths: [remove(path) for path in paths]), *others)
    assert len(said) == 1 and said[0].endswith("None is left, and CheckpointAveraging changes no weights.")
    assert (ours.kept, ours.path, ours.best_path, ours.score) == ([], "", "", None)
    assert module.net.weight.item() == (1.0 if others else 8.0)


class RemovesAtTheEnd(Callback):
    """Comes after CheckpointAveraging, and keeps nothing but the checkpoints that it knows."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self.folder, self.pattern = folder, pattern

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        for path in self.folder.glob(self.pattern):
            path.unlink()


def test_checkpoints_that_are_not_used_are_not_missed(tmp_path: Path) -> None:
    """The fit ends with the mean of all three, so that they may be removed."""
    module, ours = Scripted([1.0, 2.0, 9.0], 4.0), CheckpointAveraging(top=3)
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=3)
    others = [RemovesAtTheEnd(tmp_path, "epoch*"), ours, saved]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "CheckpointAveraging")
        trainer(others, max_epochs=3, enable_checkpointing=True).fit(module, data(1), data(1))
    assert module.net.weight.item() == 4.0 and ours.best_path == ours.path


@pytest.mark.parametrize(("pattern", "ends_with"), [("average*", 2.0), ("*", 9.0)])
def test_checkpoints_that_are_removed_after_the_averaging(tmp_path: Path, pattern: str, ends_with: float) -> None:
    """The mean of 1, 2 and 9 is the best by far; without it the fit ends with the second best, else as it is."""
    module, ours = Scripted([1.0, 2.0, 9.0], 4.0), CheckpointAveraging(top=3)
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=3)
    removes = RemovesAtTheEnd(tmp_path, pattern)
    running = trainer([removes, ours, saved], max_epochs=3, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"CheckpointAveraging leaves out .*average-of-best-3\.ckpt is not there"):
        running.fit(module, data(1), data(1))
    assert module.net.weight.item() == ends_with
    assert bool(ours.best_path) == (ends_with != 9.0)
    assert ("raw" in ours.state_dict()) == (ends_with != 9.0)


class Slow(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.2)
        super().save_checkpoint(*args, **kwargs)


def test_checkpoints_that_are_still_being_written_are_waited_for(tmp_path: Path) -> None:
    if not hasattr(AsyncCheckpointIO, "_ensure_setup"):
        pytest.skip("AsyncCheckpointIO of this version does not copy the weights, and writes those of later steps")
    module, ours = Scripted([9.0, 2.0, 1.0], 1.5), CheckpointAveraging(top=2)
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    options: dict[str, Any] = {"plugins": [AsyncCheckpointIO(Slow())], "enable_checkpointing": True, "max_epochs": 3}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "CheckpointAveraging")
        trainer([ours, saved], **options).fit(module, data(1), data(1))
    assert module.net.weight.item() == 1.5 and ours.best_path == ours.path


def sharded(folder: str, spoil: Callable[[Path], Any]) -> list[Any]:
    saved = ModelCheckpoint(folder, monitor="val_loss", save_top_k=3)
    ours, module = CheckpointAveraging(top=3), build(Cell("automatic", "32-true", "fsdp2", "1"))
    meddles = Meddles(lambda paths: spoil(paths[0]))
    two_processes([meddles, ours, saved], enable_checkpointing=True, max_epochs=3).fit(module)
    return [full_weights(module), ours.kept, ours.path, ours.best_path]


def remove_metadata(path: Path) -> None:
    os.unlink(path / ".metadata")


def replace_by_file(path: Path) -> None:
    remove(path)
    torch.save({"state_dict": {}}, path)


@pytest.mark.parametrize("spoil", [remove, remove_metadata, replace_by_file])
def test_folders_of_shards(group: Group, spoil: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for final, kept, path, best in group.run(sharded, folder, spoil):
            assert len(kept) == 2
            assert_close(average_checkpoints([path]), average_checkpoints(kept))
            assert_close(final, average_checkpoints([best]))


# ---- beside a ModelCheckpoint of a package ----


class BestFew(ModelCheckpoint):
    """Has another class than the package's, so that Lightning tells their states apart."""


class Package:
    """Adds a ModelCheckpoint of its own, and loads its best checkpoint after the fit, as packages do."""

    def __init__(self, folder: Path, callbacks: list[Callback]) -> None:
        self.own = ModelCheckpoint(folder, monitor="val_loss", save_top_k=1)
        self.callbacks = callbacks

    def train(self, first: bool, **options: Any) -> Model:
        callbacks = [self.own, *self.callbacks] if first else [*self.callbacks, self.own]
        fit(module := Model(), callbacks, enable_checkpointing=True, **{"max_epochs": 4} | options)
        return module


@pytest.mark.parametrize("first", [True, False], ids=["package first", "user first"])
@pytest.mark.parametrize("folders", ["one", "two"])
def test_beside_the_checkpoints_of_a_package(tmp_path: Path, first: bool, folders: str) -> None:
    theirs, mine = tmp_path / "package", tmp_path / ("package" if folders == "one" else "best-few")
    few, ours = BestFew(mine, monitor="val_loss", save_top_k=3), CheckpointAveraging(top=3)
    package = Package(theirs, [few, ours])
    module = package.train(first)
    assert ours.kept == sorted(few.best_k_models, key=few.best_k_models.__getitem__)
    assert package.own.best_model_path not in ours.kept
    best, also = (
        torch.load(path, weights_only=True)["state_dict"] for path in (package.own.best_model_path, ours.kept[0])
    )
    assert_equal(best, also)
    assert_equal(snapshot(module), torch.load(ours.best_path, weights_only=True)["state_dict"])


def test_a_resumed_run_knows_both(tmp_path: Path) -> None:
    def package() -> Package:
        return Package(tmp_path, [BestFew(tmp_path, monitor="val_loss", save_top_k=3), CheckpointAveraging(top=3)])

    package().train(True, max_epochs=2)
    (again := package()).train(True, ckpt=max(tmp_path.glob("epoch=1*.ckpt")))
    assert len(again.callbacks[0].best_k_models) == 3
    assert_close(average_checkpoints(again.callbacks[1].kept), average_checkpoints(again.callbacks[0].best_k_models))


def test_of_one_class_they_are_refused_and_the_refusal_names_the_way(tmp_path: Path) -> None:
    package = Package(tmp_path, [CheckpointAveraging(top=3)])
    with pytest.raises(Exception, match=r"If a package adds one.*`class BestFew\(ModelCheckpoint\): pass`"):
        package.train(True)
    again = [ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=3), CheckpointAveraging(top=3)]
    with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `ModelCheckpoint`"):
        Package(tmp_path, again).train(True)  # Lightning's own sentence
