"""The session of a fit: its state, what is undone when it closes, a second fit, an exception, a nested Trainer."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import L2, ExactResume, GradientClipping, OptimCallback, WeightRegularization
from lightning_optim.runtime.session import Session, SessionState
from tests.harness.cells import Cell
from tests.integration.entry_fits import Fitted, assert_same, fit, prepare
from tests.lightning import BoringModel, Callback, LightningModule, MisconfigurationException, Trainer
from tests.registry import BY_NAME

STEPS = Cell("automatic", "32-true", "single", "1")
ORDER = [SessionState.SETUP, SessionState.STARTED, SessionState.TRAINING, SessionState.ENDED]


@pytest.fixture
def session() -> Session:
    return Session(Trainer(barebones=True, accelerator="cpu"))


# ---- state -----------------------------------------------------------------------------------------------------------


def allowed(before: SessionState, after: SessionState) -> bool:
    """Return True if the second state may follow: the next of a fit that ends well, FAILED, or CLOSED."""
    if after is SessionState.CLOSED:
        return before is not SessionState.CLOSED
    if after is SessionState.FAILED:
        return before in ORDER
    return (before, after) in itertools.pairwise(ORDER)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(SessionState, SessionState)))
def test_transitions(session: Session, before: SessionState, after: SessionState) -> None:
    session.state = before
    if before is after:
        assert not session._enter(after), "the second call of a hook does nothing"
    elif allowed(before, after):
        assert session._enter(after)
        assert session.state is after
    else:
        with pytest.raises(RuntimeError, match=f"cannot go from {before.name} to {after.name}"):
            session._enter(after)
        assert session.state is before


class States(OptimCallback):
    """Record the state of the session in each hook, patch an attribute of the module, and raise in one hook."""

    def __init__(self, fails_in: str = "", name: str | None = None) -> None:
        super().__init__(name)
        self.fails_in, self.seen, self.sessions = fails_in, [], []  # type: ignore[var-annotated]

    def note(self, hook: str) -> None:
        self.seen.append((hook, self.session.state))
        if self.session not in self.sessions:
            self.sessions.append(self.session)
        if hook == self.fails_in:
            raise ZeroDivisionError(hook)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.note("setup")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.session.patch(pl_module, "patched", self)
        self.note("on_fit_start")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.session.on_close(lambda: self.seen.append(("closed", self.sessions[-1].state)))
        self.note("on_train_start")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("on_train_end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("on_fit_end")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.note("on_exception")


WELL = [
    ("setup", SessionState.SETUP),
    ("on_fit_start", SessionState.STARTED),
    ("on_train_start", SessionState.TRAINING),
    ("on_train_end", SessionState.TRAINING),
    ("on_fit_end", SessionState.ENDED),
    ("closed", SessionState.CLOSED),
]


def test_states_of_a_fit_and_of_a_second_one() -> None:
    one, other = States(name="one"), States(name="other")
    for number in (1, 2):
        fitted = fit(BY_NAME["plain"], STEPS, callbacks=[one, other])
        assert one.seen == other.seen == WELL * number
        assert one.sessions == other.sessions
        assert len(one.sessions) == number, "each fit has a session of its own"
        assert one.fit is other.fit is None
        assert not hasattr(fitted.module, "patched")
        assert Session.find(fitted.trainer) is None


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_train_end", "on_fit_end"])
@pytest.mark.parametrize("first", [True, False])
def test_states_of_a_fit_that_fails(hook: str, first: bool) -> None:
    """A fit may fail in any hook, also after another callback has run the hook."""
    failing, beside = States(fails_in=hook), GradientClipping(0.1)
    fitted = prepare(BY_NAME["plain"], STEPS, callbacks=[failing, beside] if first else [beside, failing])
    with pytest.raises(ZeroDivisionError, match=hook):
        fitted.trainer.fit(fitted.module)
    until = [name for name, _ in WELL].index(hook) + 1
    closed = [("closed", SessionState.CLOSED)] if until > 2 else []
    assert failing.seen == [*WELL[:until], ("on_exception", SessionState.FAILED), *closed]
    assert failing.fit is beside.fit is Session.find(fitted.trainer) is None
    assert not hasattr(fitted.module, "patched")
    failing.fails_in, failing.seen = "", []
    assert_same(
        fit(BY_NAME["plain"], STEPS, callbacks=[failing, beside]),
        fit(BY_NAME["plain"], STEPS, callbacks=[GradientClipping(0.1)]),
    )
    assert failing.seen == WELL


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_resumed_run_with_nothing_left_to_train(tmp_path: Path) -> None:
    """The run begins and ends in one hook, in which callbacks have its step count."""

    class Ended(OptimCallback):
        told: tuple[Any, ...] = ()

        def resume_ended(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.told += (self.session.state, list(self.steps))

    fit(BY_NAME["plain"], STEPS, callbacks=[Ended()]).trainer.save_checkpoint(tmp_path / "ended.ckpt")
    resumed, new = Ended(), Ended(name="new")
    fit(BY_NAME["plain"], STEPS, callbacks=[resumed, new], ckpt_path=tmp_path / "ended.ckpt")
    assert resumed.told == new.told == (SessionState.TRAINING, [8])


# ---- what is undone --------------------------------------------------------------------------------------------------


class Owner:
    """Owner of an attribute of its class."""

    value = "of the class"


def test_everything_is_undone_in_reverse_order(session: Session) -> None:
    owner, done = Owner(), []  # type: ignore[var-annotated]
    session.patch(owner, "value", "first")
    session.on_close(lambda: done.append(owner.value))
    session.patch(owner, "value", "second")
    session.on_close(lambda: done.append(owner.value))
    assert not done
    session.close()
    assert done == ["second", "first"]
    assert "value" not in vars(owner)
    session.close()
    assert done == ["second", "first"], "a closed session has nothing more to undo"


def test_an_own_attribute_comes_back(session: Session) -> None:
    owner = Owner()
    owner.value = "of the instance"
    session.patch(owner, "value", None)
    session.close()
    assert vars(owner) == {"value": "of the instance"}


def test_what_a_module_registers_comes_back(session: Session) -> None:
    """A submodule, a parameter and a buffer are registered again: the same object, in the same order, as persistent."""
    module = nn.BatchNorm1d(2)
    module.layer, module.note = nn.Linear(2, 2), None
    module.register_buffer("hidden", torch.ones(2), persistent=False)
    before = {name: getattr(module, name) for name in ("layer", "weight", "running_mean", "hidden", "note")}
    keys = list(module.state_dict())
    new = {name: torch.zeros(2) for name in ("running_mean", "hidden")}
    new |= {"layer": nn.Linear(2, 2), "weight": nn.Parameter(torch.ones(2)), "note": nn.Linear(1, 1)}
    for name, value in new.items():
        session.patch(module, name, value)
        assert getattr(module, name) is value
    session.patch(module, "bias", None)
    session.patch(module, "fresh", nn.Linear(2, 2))
    session.close()
    assert all(getattr(module, name) is value for name, value in before.items())
    assert list(module.state_dict()) == keys
    assert not hasattr(module, "fresh")
    assert module.bias is not None


def test_what_cannot_be_patched_is_refused(session: Session) -> None:
    module = nn.BatchNorm1d(2)
    with pytest.raises(
        TypeError, match="`running_mean` of BatchNorm1d is a Tensor, and can be patched only by another"
    ):
        session.patch(module, "running_mean", nn.Parameter(torch.ones(2)))
    with pytest.raises(TypeError, match="`a` of dict cannot be patched"):
        session.patch({}, "a", 1)
    session.close()
    assert isinstance(module.running_mean, torch.Tensor)


def test_an_exception_while_undoing_leaves_nothing_installed(session: Session) -> None:
    owner, done = Owner(), []  # type: ignore[var-annotated]
    session.patch(owner, "value", "patched")
    session.on_close(lambda: done.append("first"))
    session.on_close(lambda: 1 / 0)
    session.on_close(lambda: done.append("last"))
    with pytest.raises(ZeroDivisionError):
        session.close()
    assert done == ["last", "first"]
    assert owner.value == "of the class"
    assert session.state is SessionState.CLOSED
    assert Session.in_setup(session.trainer) is not session


def test_an_exception_at_the_end_of_a_fit_frees_the_callbacks() -> None:
    class Careless(OptimCallback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.session.on_close(lambda: 1 / 0)

    careless, clipping = Careless(), GradientClipping(0.1)
    with pytest.raises(ZeroDivisionError):
        fit(BY_NAME["plain"], STEPS, callbacks=[clipping, careless])
    assert careless.fit is clipping.fit is None
    assert fit(BY_NAME["plain"], STEPS, callbacks=[clipping]).ours[0].steps == [8]


class Fails(Callback):
    """Raise in one hook, and in ``on_exception``: the Trainer then calls no later hook, and is not torn down."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

        def fail(*_: Any) -> None:
            raise ZeroDivisionError(hook)

        setattr(self, hook, fail)
        self.on_exception = fail  # type: ignore[method-assign]

    def mend(self) -> None:
        del self.on_exception
        delattr(self, self.hook)


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_train_batch_start"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other_trainer", [True, False])
def test_a_fit_after_two_exceptions(hook: str, first: bool, other_trainer: bool) -> None:
    """The second exception, in ``on_exception``, may come before this package hears of the first."""
    fails, ours = Fails(hook), States()
    callbacks = [fails, ours] if first else [ours, fails]
    fitted = prepare(BY_NAME["plain"], STEPS, callbacks=callbacks)
    with pytest.raises(ZeroDivisionError, match=hook):
        fitted.trainer.fit(fitted.module)
    fails.mend()
    ours.seen = []
    if other_trainer:
        fitted = prepare(BY_NAME["plain"], STEPS, callbacks=callbacks)
    fitted.trainer.fit(fitted.module)
    assert [seen for seen in ours.seen if seen[0] != "closed"] == WELL[:-1]
    assert ours.fit is Session.find(fitted.trainer) is None
    assert not hasattr(fitted.module, "patched")


# ---- two Trainers, one object ----------------------------------------------------------------------------------------


class Nesting(Callback):
    """Run another Trainer with the same callbacks in the middle of a fit."""

    def __init__(self, run: str, shared: list[Any]) -> None:
        self.run, self.shared = run, shared
        self.error: Exception | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 2 or self.error is not None:
            return
        inner = prepare(BY_NAME["plain"], STEPS, callbacks=self.shared)
        draws = torch.get_rng_state()
        try:
            getattr(inner.trainer, self.run)(inner.module)
        except MisconfigurationException as error:
            self.error = error
        finally:
            torch.set_rng_state(draws)
            torch.set_grad_enabled(True)


def nested(run: str, callbacks: list[Any], shared: list[Any]) -> tuple[Nesting, Fitted]:
    nesting = Nesting(run, shared)
    return nesting, fit(BY_NAME["several"], STEPS, callbacks=[*callbacks, nesting])


@pytest.mark.parametrize("with_another_of_ours", [False, True])
def test_a_nested_fit_is_refused_and_harms_nothing(with_another_of_ours: bool) -> None:
    callbacks = BY_NAME["several"].all_callbacks(STEPS)
    fresh = [WeightRegularization(L2(0.1), name="inner")] if with_another_of_ours else []
    nesting, fitted = nested("fit", callbacks, [*fresh, callbacks[1]])
    assert "GradientClipping is in the running fit of another Trainer" in str(nesting.error)
    assert all(callback.fit is None for callback in [*fresh, *fitted.ours])
    assert_same(fitted, fit(BY_NAME["several"], STEPS))


class Logging(OptimCallback):
    """Log through `self.log`, which each Trainer binds to its own module."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.log("mine", float(trainer.global_step))
        self.log_dict({"mine too": float(trainer.global_step)})


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_a_nested_run_leaves_the_log_alone(run: str) -> None:
    logging = Logging()
    nesting, fitted = nested(run, [logging], [logging])
    assert (nesting.error is None) is (run == "validate")
    steps = fitted.trainer.global_step
    assert logging.steps == [steps]
    assert fitted.trainer.callback_metrics["mine"] == fitted.trainer.callback_metrics["mine too"] == steps


def test_a_nested_validation_with_the_same_callbacks() -> None:
    """The validation does not change the fit: callbacks that act at steps do nothing in it."""
    callbacks = [*BY_NAME["several"].all_callbacks(STEPS), ExactResume()]
    nesting, fitted = nested("validate", callbacks, callbacks)
    assert nesting.error is None
    assert_same(fitted, fit(BY_NAME["several"], STEPS))


def test_a_copy_of_a_trainer_in_the_middle_of_a_fit_has_no_session() -> None:
    """The copy is in no fit, and the fit goes on."""

    class Copying(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                self.copies = [copy.deepcopy(trainer), copy.deepcopy(trainer.fit_loop).trainer]

    copying, clipping = Copying(), GradientClipping(0.1)
    options: dict[str, Any] = {"limit_train_batches": 4, "enable_checkpointing": False, "logger": False}
    Trainer(accelerator="cpu", max_epochs=1, callbacks=[copying, clipping], **options).fit(BoringModel())
    assert clipping.steps == [4]
    for trainer in copying.copies:
        assert Session.find(trainer) is None
        (copied,) = (callback for callback in trainer.callbacks if isinstance(callback, OptimCallback))
        assert (copied.fit, copied.steps) == (None, [2])


class FailingTwice(Callback):
    """Raise in `on_exception`, which keeps the Trainer from its teardown."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise ZeroDivisionError

    def on_exception(self, *_: Any) -> None:
        raise KeyError("worse")


def test_after_a_fit_that_stopped_without_a_word() -> None:
    """The callback may fit again."""
    clipping = GradientClipping(0.1)
    with pytest.raises(KeyError, match="worse"):
        fit(BY_NAME["plain"], STEPS, callbacks=[FailingTwice(), clipping])
    assert clipping.fit is not None
    assert_same(
        fit(BY_NAME["plain"], STEPS, callbacks=[clipping]),
        fit(BY_NAME["plain"], STEPS, callbacks=[GradientClipping(0.1)]),
    )


def test_a_session_that_was_never_closed_lives_no_longer_than_its_trainer() -> None:
    trainer = Trainer(barebones=True, accelerator="cpu")
    kept = weakref.ref(Session.in_setup(trainer))
    assert Session.find(trainer) is kept() is not None
    del trainer
    gc.collect()
    assert kept() is None


def test_outside_of_a_fit_a_sentence_says_so() -> None:
    own = OptimCallback()
    with pytest.raises(RuntimeError, match="OptimCallback is in no fit"):
        own.on_fit_start(Trainer(barebones=True, accelerator="cpu"), LightningModule())
    with pytest.raises(AttributeError, match="only while a Trainer runs"):
        own.log("x", 1.0)
    assert not hasattr(own, "log")
