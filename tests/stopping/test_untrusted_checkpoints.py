"""Test resuming from an untrusted checkpoint: no path that it names is written, removed or unpickled."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import EarlyStopping
from tests.lightning import supported
from tests.stopping.scripted_fits import Scripted, data, fit, same, trainer, weights

SCORES = [3.0, 2.0, 1.0, 2.0, 2.0]


def _stopping(folder: Path) -> EarlyStopping:
    return EarlyStopping("val_loss", patience=math.inf, dirpath=str(folder))


def _strange(tmp_path: Path, path: Path) -> Path:
    """Write a checkpoint of the first epoch that names ``path`` as its best checkpoint."""
    given = tmp_path / "given.ckpt"
    fit(Scripted(SCORES), _stopping(tmp_path / "first"), max_epochs=1).save_checkpoint(given)
    checkpoint = torch.load(given, weights_only=True)
    (state,) = (state for state in checkpoint["callbacks"].values() if "best_path" in state)
    state["best_path"] = str(path)
    torch.save(checkpoint, given)
    return given


@pytest.mark.parametrize("what", ["file", "folder", "beside"])
def test_a_path_that_a_checkpoint_names_is_not_replaced(what: str, tmp_path: Path) -> None:
    precious = tmp_path / "elsewhere" / "best.ckpt"
    precious.parent.mkdir()
    kept = {"file": precious, "folder": precious / "thesis", "beside": Path(f"{precious}.new")}[what]
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years of work")
    module, callback = Scripted(SCORES), _stopping(tmp_path / "second")
    fit(module, callback, ckpt_path=_strange(tmp_path, precious))
    assert kept.read_text() == "years of work"
    assert callback.best_path == str(tmp_path / "second" / "best.ckpt")
    assert same(weights(module), module.seen[1])  # of the epochs that this fit has seen: the second
    assert sorted(os.listdir(precious.parent)) == [Path(kept if what == "beside" else precious).name]


@pytest.mark.parametrize("name", ["notes.txt", "best.ckpt/../notes.txt", "best-v1.ckpt.bak"])
def test_other_files_of_the_directory_are_not_replaced(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    bystander = folder / Path(name).name
    bystander.write_text("notes")
    callback = _stopping(folder)
    fit(Scripted(SCORES), callback, ckpt_path=_strange(tmp_path, folder / name))
    assert bystander.read_text() == "notes"
    assert callback.best_path == str(folder / "best.ckpt")


def test_a_resumed_run_goes_on_with_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callbacks: list[Any] = [_stopping(Path("best")), EarlyStopping("val_loss", dirpath=str(tmp_path / "best"))]
    fit(Scripted(SCORES), callbacks[0], max_epochs=1).save_checkpoint("given.ckpt")
    fit(Scripted(SCORES), callbacks[1], ckpt_path="given.ckpt")
    assert os.listdir("best") == ["best.ckpt"]


class Parameterized(Scripted):
    """Has an object among its hyper-parameters, which Lightning writes into each checkpoint."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__(scores)
        self.save_hyperparameters({"root": Path("/somewhere")})


def test_the_best_of_an_earlier_run_is_restored_beside_objects(tmp_path: Path) -> None:
    scores = [1.0, 2.0, 3.0, 2.0, 2.0]
    first = Parameterized(scores)
    fit(first, _stopping(tmp_path / "best"), max_epochs=2).save_checkpoint(tmp_path / "given.ckpt")
    second, resumed = Parameterized(scores), trainer(_stopping(tmp_path / "best"))
    given = {"ckpt_path": tmp_path / "given.ckpt", **supported(resumed.fit, weights_only=False)}
    resumed.fit(second, data(), data(seed=1), **given)
    assert same(weights(second), first.seen[0])


def test_a_new_best_spares_what_lies_where_it_would_be_written(tmp_path: Path) -> None:
    (tmp_path / "best.ckpt.new").write_text("precious")
    callback = _stopping(tmp_path)
    fit(Scripted(SCORES), callback)
    assert (tmp_path / "best.ckpt.new").read_text() == "precious"
    assert callback.best_path == str(tmp_path / "best-v1.ckpt")
