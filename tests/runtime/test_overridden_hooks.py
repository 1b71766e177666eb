"""Hooks that a subclass, a mixin or an object overrides, with `super()` or without."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import AutoClip, GradientClipping, OptimCallback
from lightning_optim.resume.exact_resume import ExactResume
from lightning_optim.runtime.overridden_hooks import TwoPartHook
from tests.harness.cells import Cell
from tests.integration.entry_fits import (
    CELL,
    KeepsHistory,
    assert_same,
    differences,
    each_slot,
    fit,
    reference_fit,
    states,
)
from tests.integration.installed import installed
from tests.lightning import Callback, LightningModule, ModelCheckpoint, Timer, Trainer
from tests.registry import BY_NAME, Entry

HOOKS = sorted(name for name in dir(Callback) if not name.startswith("_") and callable(getattr(Callback, name)))
OVERRIDDEN = sorted({*HOOKS, "reset", "extra_state", "load_extra_state"} - {"on_before_optimizer_step"})
STEPS = Cell("automatic", "32-true", "single", "1")


def silent(name: str) -> Any:
    """Make a hook that does nothing and does not call `super()`."""
    state = {} if name in ("state_dict", "extra_state") else None
    return lambda self, *args, **kwargs: state


def calling(name: str) -> Any:
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("heard", []).append(name)
        return getattr(super(type(self), self), name)(*args, **kwargs)

    return hook


def overridden(callbacks: list[Any], make: Any) -> list[Any]:
    """Make the callbacks objects of subclasses that override every hook after the class was made."""
    for callback in callbacks:
        if isinstance(callback, OptimCallback):
            kind = type(callback)
            callback.__class__ = type(kind.__name__, (kind,), {"__qualname__": kind.__qualname__})
            for name in OVERRIDDEN:
                setattr(callback.__class__, name, make(name))
    return callbacks


@each_slot
@pytest.mark.parametrize("make", [silent, calling])
def test_every_hook_overridden(entry: Entry, make: Any) -> None:
    """With and without `super()`, the run, the state and what stays installed are those of the class itself."""
    callbacks = overridden(entry.all_callbacks(CELL), make)
    fitted = fit(entry, CELL, KeepsHistory, callbacks=callbacks)
    assert_same(fitted, reference_fit(entry))
    assert not differences(fitted.module.states, reference_fit(entry).module.states)
    assert not differences(states(fitted.callbacks), reference_fit(entry).states)
    assert not differences(installed(fitted), installed(reference_fit(entry)))
    assert all(callback.fit is None for callback in fitted.ours)


def test_each_hook_of_a_user_is_called_once() -> None:
    """The user's hook is called as often as in a plain Lightning callback, also if it calls `super()`."""

    class Plain(Callback):
        pass

    for name in HOOKS:
        setattr(Plain, name, calling(name))
    plain, ours = Plain(), overridden([GradientClipping(1.0)], calling)[0]
    fit(BY_NAME["plain"], STEPS, callbacks=[plain, ours])
    inner = {"reset", "extra_state", "load_extra_state"}
    wanted = [name for name in plain.heard if name in OVERRIDDEN]
    assert [name for name in ours.heard if name not in inner] == wanted


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_train_batch_start", "reset"])
@pytest.mark.parametrize("where", ["class", "mixin", "object"])
def test_wherever_it_is_overridden(hook: str, where: str) -> None:
    """Overridden in the class, in a mixin or on the object: the package's part runs first, then the user's."""
    seen = []

    def theirs(*args: Any, **kwargs: Any) -> None:
        seen.append(own.fit is not None)

    class Own(OptimCallback):
        heard = 0

        def on_after_optimizer_step(self, *_: Any) -> None:
            self.heard += 1

    mixin = type("Mixin", (), {hook: theirs})
    own = type("Mixed", (mixin, Own), {})() if where == "mixin" else Own()
    if where == "class":
        setattr(Own, hook, theirs)
    elif where == "object":
        setattr(own, hook, theirs)
    fit(BY_NAME["plain"], STEPS, callbacks=[own])
    assert own.heard == own.steps[0] == 8
    assert seen
    assert all(seen)


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_another_callback_of_lightning(ours_first: bool) -> None:
    """Both classes' hooks run, in either order of the bases."""
    bases = (OptimCallback, Timer) if ours_first else (Timer, OptimCallback)

    def init(self: Any) -> None:
        OptimCallback.__init__(self)
        Timer.__init__(self)

    both = type("Both", bases, {"__init__": init})()
    fit(BY_NAME["plain"], STEPS, callbacks=[both])
    assert both.steps == [8]
    assert both.time_elapsed("train") > 0.0
    assert both.fit is None


class _Called:
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __call__(self, *args: Any) -> None:
        self.seen.append(args)


@pytest.mark.parametrize("kind", ["static", "class", "partial", "object"])
def test_every_kind_of_method(kind: str) -> None:
    """A method of each kind gets the arguments that Python gives it."""
    seen: list[Any] = []
    note = _Called(seen)
    hook, before = {
        "static": (staticmethod(note), 0),
        "class": (classmethod(lambda cls, *args: note(*args)), 0),
        "partial": (functools.partialmethod(lambda self, tag, *args: note(tag, *args), "tag"), 1),
        "object": (note, 0),
    }[kind]
    own = type("Own", (GradientClipping,), {"on_train_start": hook})(0.1)
    fit(BY_NAME["plain"], STEPS, callbacks=[own])
    assert [len(args) - before for args in seen] == [2]
    assert own.steps == [8]


def test_the_packages_part_runs_again_in_a_nested_call_of_the_same_hook() -> None:
    """An example is a validation that a user's validation hook starts."""
    places: list[int] = []

    class Again(GradientClipping):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.on_train_batch_start(trainer, pl_module, batch, 77)
                places.append(self._batch_idx)

    fit(BY_NAME["plain"], STEPS, callbacks=[Again(0.1)])
    assert places
    assert set(places) == {77}


def test_a_copy_is_overridden_too() -> None:
    """A copy made in the middle of a hook holds nothing of the original's run."""

    class Copying(GradientClipping):
        copies: tuple[Any, ...] = ()

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.copies = (copy.deepcopy(self), pickle.loads(pickle.dumps(self)))

    globals()["Copying"] = Copying
    Copying.__qualname__ = "Copying"
    original = Copying(0.1)
    first = fit(BY_NAME["plain"], STEPS, KeepsHistory, callbacks=[original])
    assert not any(isinstance(value, TwoPartHook) for one in original.copies for value in vars(one).values())
    for one in original.copies:
        again = fit(BY_NAME["plain"], STEPS, KeepsHistory, callbacks=[one])
        assert_same(again, first)
        assert again.ours[0].copies


def test_the_hook_of_a_step_needs_super() -> None:
    """A subclass that overrides it decides in which steps the class acts, by calling `super()`."""

    class Late(GradientClipping):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.current_epoch > 0:
                super().on_before_optimizer_step(trainer, pl_module, optimizer)

    class Measuring(Callback):
        def __init__(self) -> None:
            self.short: list[bool] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
            self.short.append(bool(norm < 0.011))

    measuring = Measuring()
    fit(BY_NAME["plain"], STEPS, callbacks=[Late(0.01), measuring])
    half = len(measuring.short) // 2
    assert measuring.short == [False] * half + [True] * half


class OwnState(GradientClipping):
    """Save state in Lightning's way, without `super()`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


class OwnExtra(GradientClipping):
    """Save state in this package's way, without `super()`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1

    def extra_state(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self.batches = extra["batches"]


@pytest.mark.filterwarnings("ignore:Be aware that when using")
@pytest.mark.parametrize("kind", [OwnState, OwnExtra])
def test_state_of_both_is_saved(kind: Any, tmp_path: Path) -> None:
    """The user's state and the package's are loaded, so that a resumed run equals the whole one."""
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    first = fit(
        BY_NAME["plain"],
        STEPS,
        KeepsHistory,
        callbacks=[kind(AutoClip(20.0)), ExactResume(), saver],
        enable_checkpointing=True,
    )
    resumed = fit(
        BY_NAME["plain"],
        STEPS,
        KeepsHistory,
        callbacks=[kind(AutoClip(20.0)), ExactResume()],
        ckpt_path=tmp_path / "step=3.ckpt",
    )
    assert not differences(resumed.outcome.final, first.outcome.final)
    assert resumed.ours[0].batches == first.ours[0].batches == 8
    first.trainer.save_checkpoint(tmp_path / "after.ckpt")
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"][first.ours[0].state_key]
    assert state["batches"] == 8
    assert state["steps"] == [8]
