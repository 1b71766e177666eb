"""After a fit in processes that a launcher started, callbacks have the attributes that they got there."""

from __future__ import annotations

import copy
import math
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import (
    EMA,
    L2,
    SWA,
    EarlyStopping,
    GradientClipping,
    OptimCallback,
    WeightAveraging,
    WeightRegularization,
)
from tests.averaging.models import Model, assert_close, assert_equal, data, fit, norm_net, snapshot
from tests.lightning import Callback, ModelCheckpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

# Lightning's own sampler for several processes would shuffle.
LAUNCHED: dict[str, Any] = {"use_distributed_sampler": False}


class Counting(OptimCallback):
    """A user's callback, with attributes that come back and others that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0
        self.module: Any = None
        self.trainer: Any = None

    def on_after_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.counted += 1
        self.module, self.trainer = pl_module, trainer


def callbacks(folder: str) -> dict[str, Any]:
    return {
        "average": WeightAveraging(EMA(0.8), apply_at_end=False, compare=True),
        "other": WeightAveraging(SWA(), evaluate=False, apply_at_end=False),
        "stop": EarlyStopping("val_loss", patience=1, restore_best=False),
        "best": EarlyStopping("val_loss", patience=math.inf, name="best"),
        "file": EarlyStopping("val_loss", patience=math.inf, name="file", dirpath=folder),
        "terms": WeightRegularization([L2(0.1)]),
        "clip": GradientClipping(1.0),
        "own": Counting(),
    }


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_callbacks_are_as_after_a_fit_in_this_process(strategy: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # forked processes have it, and spawned ones not
    here, there = callbacks(str(tmp_path / "here")), callbacks(str(tmp_path / "there"))
    model, launched = Model(make=norm_net, lr=0.3), Model(make=norm_net, lr=0.3)
    for module, own, options in ((model, here, {}), (launched, there, {"strategy": strategy, **LAUNCHED})):
        torch.manual_seed(3)
        fit(module, own.values(), max_epochs=4, **options)
    assert_close(snapshot(launched), snapshot(model))
    stayed = r"ran in other processes .*the {} stayed there: only the module's weights come back"
    error = pytest.raises(RuntimeError, match=stayed.format("average of WeightAveraging"))
    with error, there["average"].averaged_weights(launched):
        pass
    with pytest.raises(RuntimeError, match=stayed.format("best weights of EarlyStopping")):
        there["best"].restore_best_(launched)
    assert not there["average"].started
    there["file"].restore_best_(other := Model(make=norm_net))
    assert_equal(snapshot(other), snapshot(launched))  # which the fit has ended with
    for name, callback in there.items():
        assert callback.steps == here[name].steps != []
        assert callback.fit is None
    assert len(there["average"].comparison.points) == len(here["average"].comparison.points) > 0
    there["average"].plot()
    for name in ("stop", "best"):
        for one, other in zip(there[name].history, here[name].history, strict=True):
            assert one == pytest.approx(other)
        assert there[name].best_check == here[name].best_check
        assert there[name].stopped_epoch == here[name].stopped_epoch
    assert there["own"].counted == here["own"].counted
    assert there["own"].module is there["own"].trainer is None
    assert [path for path in tmp_path.iterdir() if path.name.startswith("lightning_optim")] == []


def test_two_processes(tmp_path: Path) -> None:
    """The attributes of the first process come back; the module ends with the average."""
    average, model = WeightAveraging(EMA(0.8)), Model()
    files = ModelCheckpoint(tmp_path, filename="one")
    fit(model, [average, files], strategy="ddp_fork", devices=2, enable_checkpointing=True)
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert_equal(snapshot(model), saved["state_dict"])
    assert average.steps == [8]


class Unpicklable(Callback):
    """Give another callback an attribute that cannot be pickled."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.other.generator = (number for number in range(3))


def test_what_cannot_come_back_says_so() -> None:
    average, stop = WeightAveraging(EMA(0.8), apply_at_end=False), EarlyStopping("val_loss", patience=math.inf)
    options: dict[str, Any] = {"strategy": "ddp_fork", **LAUNCHED}
    with pytest.warns(UserWarning, match="The fit ran in other processes, and WeightAveraging could not"):
        fit(Model(), [average, stop, Unpicklable(average)], **options)
    assert stop.history
    with pytest.raises(RuntimeError, match=r"ran in other processes, .*'generator' object\. .* load a checkpoint"):
        average.plot()
    with pytest.raises(RuntimeError, match="ran in other processes"):
        average.averaged_state()
    with pytest.warns(UserWarning, match="and EarlyStopping could not be sent back"):
        fit(Model(), [stop, Unpicklable(stop)], **options)
    with pytest.raises(RuntimeError, match="ran in other processes"):
        stop.plot()
    fit(model := Model(), [average])  # the next fit of the callback is here
    with average.averaged_weights(model):
        pass
    average.averaged_state()


def test_a_copy_holds_its_average() -> None:
    average = WeightAveraging(EMA(0.8), refresh_loader=(loader := data()))
    fit(model := Model(), [average])
    for copied in (copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        assert copied.started
        with copied.averaged_weights(other := Model()):
            assert_equal(snapshot(other), snapshot(model))
        assert len(copied.refresh_loader) == len(loader), "a spawned fit would estimate statistics on other data"
