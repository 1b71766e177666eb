"""Callbacks and modules that write weights when training ends, beside ours that write the final ones, are told of."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from lightning_optim import EMA, CheckpointAveraging, EarlyStopping, ExactResume, GradientClipping, WeightAveraging
from tests.averaging.models import Model, assert_equal, fit, norm_net, snapshot, two_processes
from tests.harness.cells import Cell
from tests.harness.models import build
from tests.harness.process_group import Group
from tests.lightning import PACKAGE, Callback, ModelCheckpoint, ModelPruning
from tests.lightning import StochasticWeightAveraging as LightningSWA
from tests.lightning import WeightAveraging as LightningAverage

READ: dict[str, Any] = {}
"""Callbacks whose code shows that they load weights."""


def read(kind: type) -> type:
    READ[kind.__name__] = kind
    return kind


class Keeps(Callback):
    """Keeps the weights of the first epoch."""

    kept: dict[str, Any]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            self.kept = snapshot(pl_module)


@read
class SavesTheBest(ModelCheckpoint):
    """As scvi-tools' ``SaveCheckpoint(load_best_on_end=True)``."""

    def __init__(self, load_best_on_end: bool = True) -> None:
        super().__init__(monitor="val_loss")
        self.load_best_on_end = load_best_on_end

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        if not self.load_best_on_end:
            return
        saved = torch.load(self.best_model_path, weights_only=True)["state_dict"]
        pl_module.net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in saved.items()})


@read
class InAMethod(Keeps):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._restore(pl_module)

    def _restore(self, pl_module: Any) -> None:
        [pl_module.load_state_dict(kept) for kept in [self.kept]]


@read
class AtTheEndOfTheFit(Keeps):
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.strategy.load_model_state_dict({"state_dict": self.kept})


@read
class BySuper(InAMethod):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)


@read
class ByAFunction(Keeps):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        set_model_state_dict(pl_module, self.kept)


class Copies(Keeps):
    """Its code does not show that it writes weights."""

    @torch.no_grad()
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            parameter.copy_(self.kept[name])


class OfTheModule(Model):
    """A module that loads weights itself."""

    def on_train_epoch_end(self) -> None:
        self.kept = snapshot(self)

    def on_train_end(self) -> None:
        self.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in self.kept.items()})


WRITERS: dict[str, Any] = {
    "EarlyStopping": (
        lambda: EarlyStopping("val_loss", patience=math.inf),
        "pass `restore_best=False` to EarlyStopping",
    ),
    "WeightAveraging": (lambda: WeightAveraging(EMA(0.5)), "pass `apply_at_end=False` to WeightAveraging"),
}
each_writer = pytest.mark.parametrize("ours", WRITERS)


def said(module: Model, *callbacks: Callback, **options: Any) -> list[str]:
    """Return the warnings of a fit that are about its final weights."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, callbacks, **options)
    return [str(one.message) for one in caught if "To end with" in str(one.message)]


@each_writer
@pytest.mark.parametrize("theirs", READ)
def test_what_can_be_read_is_told_at_the_start(ours: str, theirs: str, tmp_path: Path) -> None:
    make, way_out = WRITERS[ours]

    class Fails(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("before the first step")

    options: dict[str, Any] = {"default_root_dir": tmp_path, "enable_checkpointing": theirs == "SavesTheBest"}
    with warnings.catch_warnings(record=True) as caught, pytest.raises(KeyError, match="before the first"):
        warnings.simplefilter("always")
        fit(Fails(), [READ[theirs](), make()], **options)
    told = [str(one.message) for one in caught if "To end with" in str(one.message)]
    calls = {"AtTheEndOfTheFit": "load_model_state_dict", "ByAFunction": "set_model_state_dict"}.get(
        theirs, "load_state_dict"
    )
    hook = "on_fit_end" if theirs == "AtTheEndOfTheFit" else "on_train_end"
    (sentence,) = told
    assert f"`{theirs}.{hook}` calls `{calls}`, perhaps to load weights into the module, and {ours} writes" in sentence
    assert f"ends with after it, so that those of {theirs} are lost." in sentence
    assert f"To end with those of {theirs}, {way_out}; else turn off the loading of {theirs}." in sentence


@each_writer
def test_told_once_and_as_it_is_said(ours: str, tmp_path: Path) -> None:
    make, _ = WRITERS[ours]
    module, alone = Model(), Model()
    assert len(said(module, InAMethod(), make(), max_epochs=3)) == 1
    said(alone, make(), max_epochs=3)
    assert_equal(snapshot(module), snapshot(alone))  # ours has written over theirs
    off: Any = {"EarlyStopping": EarlyStopping("val_loss", patience=math.inf, restore_best=False)}
    off["WeightAveraging"] = WeightAveraging(EMA(0.5), apply_at_end=False)
    module, theirs = Model(), InAMethod()
    assert said(module, theirs, off[ours], max_epochs=3) == []
    assert_equal(snapshot(module), theirs.kept)


@each_writer
def test_a_later_callback_at_the_end_of_the_fit_is_the_last(ours: str) -> None:
    make, _ = WRITERS[ours]
    (sentence,) = said(module := Model(), make(), theirs := AtTheEndOfTheFit())
    assert f"ends with before it, so that those of {ours} are lost" in sentence
    assert_equal(snapshot(module), theirs.kept)


@each_writer
@pytest.mark.parametrize("last", [False, True])
def test_what_cannot_be_read_is_told_at_the_end(ours: str, last: bool) -> None:
    make, way_out = WRITERS[ours]
    listed = [make(), Copies()] if last else [Copies(), make()]
    (sentence,) = said(Model(), *listed, max_epochs=3)
    assert sentence.startswith("A callback or the module wrote weights when training had ended, as in `on_train_end`")
    assert f"{ours} has written over them. To end with those, {way_out}; else turn off what wrote them." in sentence


@each_writer
def test_a_module_that_loads_weights(ours: str) -> None:
    (sentence,) = said(OfTheModule(), WRITERS[ours][0]())
    assert sentence.startswith("`OfTheModule.on_train_end` calls `load_state_dict`")


class WithASwitch(Model):
    """A module whose hyper-parameter turns the loading off, and that loads into a model outside of it too."""

    def __init__(self, load_best: bool) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.outside = [copy.deepcopy(self.net)]

    def on_train_end(self) -> None:
        self.outside[0].load_state_dict(self.net.state_dict())
        if self.hparams.load_best:
            self.net.load_state_dict({name: torch.zeros_like(value) for name, value in self.net.state_dict().items()})


@each_writer
def test_a_module_with_a_switch(ours: str) -> None:
    assert said(WithASwitch(load_best=False), WRITERS[ours][0]()) == []
    assert len(said(WithASwitch(load_best=True), WRITERS[ours][0]())) == 1


def test_averages_of_lightning() -> None:
    stop = EarlyStopping("val_loss", patience=math.inf)
    for theirs in (LightningSWA(0.01, swa_epoch_start=1), LightningAverage()):
        (sentence,) = said(Model(), theirs, stop, max_epochs=3)
        assert (
            f"`{type(theirs).__name__}.on_train_end` of `{PACKAGE}` writes its average into the module, and E"
            in sentence
        )


def test_each_of_ours_is_named_in_the_way_out(tmp_path: Path) -> None:
    ours = [WeightAveraging(EMA(0.5)), EarlyStopping("val_loss", patience=math.inf), CheckpointAveraging(top=2)]
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    (sentence,) = said(Model(), InAMethod(), *ours, saved, enable_checkpointing=True)
    assert "leave CheckpointAveraging out and pass `restore_best=False` to EarlyStopping and pass `apply_" in sentence


class Exports(Callback):
    """Loads the best weights into a copy when the training ends."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.exported = copy.deepcopy(pl_module.net)
        with torch.no_grad():
            self.exported[0].weight.zero_()


class KeepsItsOwn(Keeps):
    """Loads an average of its own into a model that it keeps."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.average = copy.deepcopy(pl_module.net)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.average.load_state_dict({name.removeprefix("net."): tensor for name, tensor in self.kept.items()})


class LoadsIntoACopy(Keeps):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        exported = copy.deepcopy(pl_module)
        exported.load_state_dict(self.kept)


class LoadsAnOptimizer(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].load_state_dict(trainer.optimizers[0].state_dict())


class Freezes(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.requires_grad_(False)
        pl_module.eval()


class Converts(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.half()


SILENT: dict[str, Any] = {
    "nothing else": lambda: [],
    "a switch that is off": lambda: [SavesTheBest(load_best_on_end=False)],
    "a ModelCheckpoint": lambda: [ModelCheckpoint(monitor="val_loss", save_last=True)],
    "a copy of the module": lambda: [Exports()],
    "a model of its own": lambda: [KeepsItsOwn()],
    "a copy with other weights": lambda: [LoadsIntoACopy()],
    "the state of an optimizer": lambda: [LoadsAnOptimizer()],
    "another precision": lambda: [Converts()],
    "frozen weights": lambda: [Freezes()],
    "pruning that is made permanent": lambda: [ModelPruning("l1_unstructured", amount=0.5)],
    "others of ours": lambda: [GradientClipping(1.0), ExactResume()],
}


@each_writer
@pytest.mark.parametrize("what", SILENT)
def test_nothing_is_said_where_nothing_is_lost(ours: str, what: str, tmp_path: Path) -> None:
    callbacks = [*SILENT[what](), WRITERS[ours][0]()]
    options: dict[str, Any] = {"default_root_dir": tmp_path, "enable_checkpointing": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ExactResume")
        assert said(Model(), *callbacks, max_epochs=3, **options) == []


def test_all_of_ours_together_say_nothing(tmp_path: Path) -> None:
    ours = [
        WeightAveraging(EMA(0.5), buffers="refresh"),
        WeightAveraging(EMA(0.8), evaluate=False, apply_at_end=False, name="other"),
        EarlyStopping("val_loss", patience=math.inf),
        CheckpointAveraging(top=2),
    ]
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    assert said(Model(make=norm_net), *ours, saved, enable_checkpointing=True, max_epochs=3) == []


def test_weights_that_are_not_finite() -> None:
    class Diverges(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * float("nan")

    assert said(Diverges(), EarlyStopping("val_loss", patience=math.inf, check_finite=False)) == []


def sharded() -> list[str]:
    callbacks = [Zeroes(), EarlyStopping("val_loss", patience=math.inf)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        two_processes(callbacks, max_epochs=2).fit(build(Cell("automatic", "32-true", "fsdp2", "1")))
    return [str(one.message) for one in caught if "To end with" in str(one.message)]


class Zeroes(Callback):
    @torch.no_grad()
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.zero_()


def test_sharded_weights(group: Group) -> None:
    first, second = group.run(sharded)
    assert len(first) == 1 and "wrote weights when training had ended" in first[0]
    assert second == []
