"""Test that a killed and resumed run equals the run that was not killed, bit for bit; Lightning's resume does not."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_optim.gradients.gradient_accumulation import GradientAccumulation
from lightning_optim.resume.exact_resume import ExactResume
from tests.harness.process_group import Group, JobFailed
from tests.integration.forked_processes import killed
from tests.lightning import (
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    SIGTERMException,
    Trainer,
)
from tests.resume.killed_runs import WriteAndDie, difference, fit, fit_of_two
from tests.resume.models import (
    LazyLoader,
    ManualNet,
    Net,
    NetOfTwo,
    NetWithOneValidationBatch,
    OneCycleNet,
    PlateauNet,
    PositionLoader,
    shuffling,
    shuffling_by_itself,
)

# An epoch has six batches, and a validation three. By default a validation is due at the third and the sixth.
PLACES = {
    "a batch's end": ("on_train_batch_end", 8),
    "a batch's end, validation due": ("on_train_batch_end", 9),
    "the last batch's end, validation due": ("on_train_batch_end", 12),
    "a validation's start": ("on_validation_start", 3),
    "within a validation": ("on_validation_batch_end", 5),
    "a validation's end": ("on_validation_end", 3),
    "a validation's end, last batch": ("on_validation_end", 4),
    "an epoch's end": ("on_train_epoch_end", 1),
    "an epoch's start": ("on_train_epoch_start", 2),
}
EPOCH_ENDS = ["the last batch's end, validation due", "a validation's end, last batch", "an epoch's end"]
RUNS: dict[str, dict[str, Any]] = {
    "epochs": {},
    "steps": {"max_epochs": -1, "max_steps": 15},
    "every other epoch": {"max_epochs": 4, "check_val_every_n_epoch": 2, "val_check_interval": 1.0},
    "every four batches": {"check_val_every_n_epoch": None, "val_check_interval": 4},
    "12 steps": {"max_epochs": -1, "max_steps": 12},
    "new loaders": {"reload_dataloaders_every_n_epochs": 1},
    "no validation": {"limit_val_batches": 0},
}


@functools.cache
def whole(run: str = "epochs", loader: Callable[[], Any] = PositionLoader, net: type[Net] = Net) -> dict[str, Any]:
    """Train the run that is not killed, without ExactResume."""
    return fit([], loader, net=net, **RUNS[run])


def check(
    place: str, path: Path, run: str = "epochs", loader: Callable[[], Any] = PositionLoader, net: type[Net] = Net
) -> None:
    """Kill, resume and compare; check that Lightning alone differs."""
    arguments = {"loader": loader, "net": net, **RUNS[run]}
    hook, call = PLACES[place]
    killed(lambda: fit([ExactResume(), WriteAndDie(hook, call, path)], **arguments))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "This resume is not exact")
        resumed = fit([ExactResume()], path=path, seed=2, **arguments)
    assert difference(resumed, whole(run, loader, net)) == ""
    assert difference(fit([], path=path, **arguments), whole(run, loader, net)) != ""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.ckpt"


# ---- where the checkpoint was written --------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["epochs", "steps"])
@pytest.mark.parametrize("place", PLACES)
def test_resumed_equals_whole(place: str, run: str, path: Path) -> None:
    check(place, path, run)


@pytest.mark.parametrize("place", ["the last batch's end, validation due", "a validation's end, last batch"])
@pytest.mark.parametrize("run", ["every four batches", "12 steps"])
def test_with_other_validations(place: str, run: str, path: Path) -> None:
    # With 12 steps no step is left to take, and Lightning does not even start.
    check(place, path, run)


@pytest.mark.parametrize("call", [6, 12])
def test_last_batch_with_and_without_validation(call: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLACES, "this", ("on_train_batch_end", call))
    check("this", path, "every other epoch")


def test_last_epoch_ends_when_it_has_not_yet(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLACES, "this", ("on_train_epoch_end", 3))
    check("this", path)


def test_without_validation(path: Path) -> None:
    check("the last batch's end, validation due", path, "no validation")


@pytest.mark.parametrize(("call", "alone"), [(9, 5), (12, 3)])
def test_lightning_alone_loses_validations(call: int, alone: int, path: Path) -> None:
    # Nothing is random, so that only this is left to go wrong. At an epoch's last batch Lightning counts the epoch as
    # done, and the next one begins where the loader was: at its end.
    net = functools.partial(Net, random=False)
    killed(lambda: fit([ExactResume(), WriteAndDie("on_train_batch_end", call, path)], net=net))
    expected, exact = fit([], net=net), fit([ExactResume()], path=path, net=net)
    assert difference(exact, expected) == ""
    assert validations(expected) == validations(exact) == 6
    assert validations(fit([], path=path, net=net)) == alone


def validations(run: dict[str, Any]) -> int:
    return sum(event[0] == "validated" for event in run["events"])


# ---- loaders, modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["epochs", "steps"])
@pytest.mark.parametrize("place", EPOCH_ENDS)
def test_plain_loader_at_an_epochs_end(place: str, run: str, path: Path) -> None:
    check(place, path, run, shuffling)


@pytest.mark.parametrize("place", ["a validation's end, last batch", "an epoch's end"])
def test_loader_with_its_own_generator(place: str, path: Path) -> None:
    check(place, path, loader=shuffling_by_itself)


@pytest.mark.parametrize("place", ["a batch's end", *EPOCH_ENDS])
def test_loader_that_takes_its_position_late(place: str, path: Path) -> None:
    check(place, path, loader=LazyLoader)


def test_loaders_that_are_built_anew(path: Path) -> None:
    check("an epoch's end", path, "new loaders", shuffling)


def two_loaders() -> dict[str, PositionLoader]:
    return {"a": PositionLoader(), "b": PositionLoader(seed=4)}


def test_two_loaders(path: Path) -> None:
    check("a batch's end", path, loader=two_loaders, net=NetOfTwo)


@pytest.mark.parametrize("net", [PlateauNet, OneCycleNet, ManualNet])
@pytest.mark.parametrize("place", ["a batch's end", "an epoch's end"])
def test_schedules_and_manual_optimization(place: str, net: type[Net], path: Path) -> None:
    check(place, path, net=net)


@pytest.mark.parametrize("place", ["a batch's end, validation due", "a validation's end", "an epoch's end"])
def test_open_window(place: str, path: Path) -> None:
    def window(more: list[Callback], **arguments: Any) -> dict[str, Any]:
        return fit([ExactResume(), GradientAccumulation(4), *more], **arguments)

    killed(lambda: window([WriteAndDie(*PLACES[place], path)]))
    assert difference(window([], path=path, seed=2), window([])) == ""


# ---- what writes the checkpoint --------------------------------------------------------------------------------------


class Die(Callback):
    """Dies some batches after the last checkpoint was written."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("arguments", [{}, {"every_n_train_steps": 3}, {"monitor": "val_loss", "save_top_k": 2}])
def test_model_checkpoint(arguments: dict[str, Any], tmp_path: Path) -> None:
    def run(more: list[Callback], **rest: Any) -> dict[str, Any]:
        return fit([ModelCheckpoint(tmp_path, save_last=True, **arguments), ExactResume(), *more], **rest)

    killed(lambda: run([Die(10)]))
    assert difference(run([], path=tmp_path / "last.ckpt", seed=2), whole()) == ""


def test_killed_again_and_again(tmp_path: Path) -> None:
    path = None
    places = [
        ("on_train_batch_end", 9),
        ("on_validation_end", 1),
        ("on_train_epoch_start", 1),
        ("on_train_batch_end", 2),
    ]
    for seed, place in enumerate(places, start=1):
        before, path = path, tmp_path / str(seed)
        killed(functools.partial(fit, [ExactResume(), WriteAndDie(*place, path)], path=before, seed=seed))
    callback = ExactResume()
    assert difference(fit([callback], path=path, seed=9), whole()) == ""
    assert difference(fit([callback]), whole()) == "", "a second fit of the same object remembers the first"


class Raise(Callback):
    def __init__(self, hook: str, call: int) -> None:
        self.calls, self.call = 0, call
        setattr(self, hook, self._raise)

    def _raise(self, trainer: Trainer, *_: Any) -> None:
        self.calls += not trainer.sanity_checking
        if self.calls == self.call:
            raise RuntimeError("as planned")


@pytest.mark.parametrize(("hook", "call"), [("on_validation_batch_end", 5), ("on_train_batch_end", 8)])
def test_checkpoint_of_an_exception(hook: str, call: int, tmp_path: Path) -> None:
    callbacks = [ExactResume(), Raise(hook, call), OnExceptionCheckpoint(tmp_path)]
    with pytest.raises(RuntimeError, match="as planned"):
        fit(callbacks)
    assert difference(fit([ExactResume()], path=tmp_path / "on_exception.ckpt", seed=2), whole()) == ""


class Terminate(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 8:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("net", [Net, NetWithOneValidationBatch])
def test_checkpoint_of_sigterm(net: type[Net], tmp_path: Path) -> None:
    # A validation is due at that batch. Lightning stops within it; or after it, if it has but one batch.
    with pytest.raises(SIGTERMException):
        fit([ExactResume(), Terminate(), OnExceptionCheckpoint(tmp_path)], net=net)
    resumed = fit([ExactResume()], path=tmp_path / "on_exception.ckpt", seed=2, net=net)
    assert difference(resumed, whole(net=net)) == ""


# ---- the rest of the fit ---------------------------------------------------------------------------------------------


def test_changes_nothing_in_a_run_that_is_not_killed() -> None:
    assert difference(fit([ExactResume()]), fit([])) == ""


class Sanity(Callback):
    checks = 0

    def on_sanity_check_start(self, *_: Any) -> None:
        self.checks += 1


def test_no_sanity_check_on_resume(path: Path) -> None:
    killed(lambda: fit([ExactResume(), WriteAndDie("on_train_epoch_end", 1, path)]))
    sanity = Sanity()
    fit([ExactResume(), sanity], path=path)
    assert sanity.checks == 0
    fit([ExactResume(), sanity])
    assert sanity.checks == 1


def test_learning_rate_finder_goes_by() -> None:
    def finder() -> LearningRateFinder:
        return LearningRateFinder(num_training_steps=8, early_stop_threshold=None, attr_name="rate", update_attr=False)

    assert difference(fit([ExactResume(), finder()], net=RateNet), fit([finder()], net=RateNet)) == ""


class RateNet(Net):
    rate = 0.01


def test_leaves_nothing_installed_and_no_state_for_validate(path: Path) -> None:
    killed(lambda: fit([ExactResume(), WriteAndDie("on_train_batch_end", 9, path)]))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = ExactResume()
    trainer = Trainer(
        callbacks=[callback], max_epochs=3, accelerator="cpu", devices=1, enable_checkpointing=False, **quiet
    )
    loops = (trainer, trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop)
    before = [{name for name, value in vars(loop).items() if callable(value)} for loop in loops]
    trainer.validate(Net(), ckpt_path=path, verbose=False)
    assert callback.extra_state() == {}
    trainer.fit(Net(), PositionLoader(), ckpt_path=path)
    assert trainer.num_sanity_val_steps == 2
    assert [{name for name, value in vars(loop).items() if callable(value)} for loop in loops] == before
    for copied in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert copied.state_key == "ExactResume"
        assert copied.extra_state() == {}


# ---- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes(strategy: str, group: Group, tmp_path: Path) -> None:
    expected = group.run(fit_of_two, strategy, None, 0, None, False, False)
    for place in ("the last batch's end, validation due", "within a validation", "an epoch's end"):
        file = tmp_path / place.replace(" ", "-")
        with pytest.raises(JobFailed, match="exit code -9"):
            group.run(fit_of_two, strategy, *PLACES[place], file, False, True)
        resumed = group.run(fit_of_two, strategy, None, 0, file, True, True)
        assert [difference(a, b) for a, b in zip(resumed, expected, strict=True)] == ["", ""], place
    alone = group.run(fit_of_two, strategy, None, 0, file, True, False)
    assert all(difference(a, b) for a, b in zip(alone, expected, strict=True))


def test_distributed_sampler_keeps_its_seed(group: Group, tmp_path: Path) -> None:
    file = tmp_path / "file"
    expected = group.run(fit_of_two, "ddp", None, 0, None, False, False, shuffling)
    with pytest.raises(JobFailed, match="exit code -9"):
        group.run(fit_of_two, "ddp", *PLACES["an epoch's end"], file, False, True, shuffling)
    resumed = group.run(fit_of_two, "ddp", None, 0, file, True, True, shuffling)
    assert [difference(a, b) for a, b in zip(resumed, expected, strict=True)] == ["", ""]
