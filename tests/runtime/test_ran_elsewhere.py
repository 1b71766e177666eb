"""Where a package trains with copies of the callbacks, the user's own objects say so, and how to get the copies."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from matplotlib import pyplot

from lightning_optim import EMA, EarlyStopping, GradientMonitor, OptimCallback, WeightAveraging
from lightning_optim.runtime import ran_elsewhere
from tests.averaging.models import Model, assert_equal, data, fit, snapshot, trainer
from tests.lightning import Callback


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "copy of a copy": lambda thing: copy.deepcopy(copy.deepcopy(thing)),
}


def read_average(average: WeightAveraging) -> None:
    with average.averaged_weights(Model()):
        pass


NEEDS_A_FIT: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "suggest_clip": (GradientMonitor, lambda monitor: monitor.suggest_clip()),
    "plot of norms": (GradientMonitor, lambda monitor: monitor.plot()),
    "averaged_weights": (lambda: WeightAveraging(EMA(0.8)), read_average),
    "averaged_state": (lambda: WeightAveraging(EMA(0.8)), lambda average: average.averaged_state()),
    "plot of an average": (lambda: WeightAveraging(EMA(0.8), compare=True), lambda average: average.plot()),
    "restore_best_": (lambda: EarlyStopping("val_loss", patience=math.inf), lambda stop: stop.restore_best_(Model())),
    "plot of a metric": (lambda: EarlyStopping("val_loss", patience=math.inf), lambda stop: stop.plot()),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("what", NEEDS_A_FIT)
def test_the_users_object_says_that_a_copy_of_it_ran(what: str, how: str) -> None:
    make, use = NEEDS_A_FIT[what]
    mine = make()
    ran = trainer(COPIES[how]([mine]))
    ran.fit(Model(), data(), data(2))
    name = type(mine).__name__
    with pytest.raises(RuntimeError, match=rf"ran with a copy of this {name}.*Take the copy from the Trainer that ran"):
        use(mine)
    use(next(one for one in ran.callbacks if isinstance(one, type(mine))))  # as the sentence says
    fit(Model(), [mine])
    use(mine)


@pytest.mark.parametrize("what", NEEDS_A_FIT)
def test_results_of_an_earlier_fit_of_its_own_stay(what: str) -> None:
    make, use = NEEDS_A_FIT[what]
    fit(Model(), [mine := make()])
    fit(Model(), [copy.deepcopy(mine)])
    use(mine)


def test_a_copied_trainer() -> None:
    """As estimators do: the Trainer is made once, and copied for each series."""
    monitor, average = GradientMonitor(), WeightAveraging(EMA(0.8))
    template = trainer([monitor, average])
    for _ in range(2):
        ran = copy.deepcopy(template)
        ran.fit(Model(), data(), data(2))
    with pytest.raises(RuntimeError, match="a copy of this GradientMonitor"):
        monitor.suggest_clip()
    assert all(callback.fit is None for callback in (monitor, average))
    template.fit(model := Model(), data(), data(2))
    assert monitor.suggest_clip() > 0.0
    assert_equal(snapshot(model), average.averaged_state())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_copied_trainer_whose_fit_runs_in_another_process() -> None:
    """Its callbacks get the attributes from there, and the user's own objects have no part in it."""
    monitor = GradientMonitor()
    ran = copy.deepcopy(trainer([monitor], strategy="ddp_fork", use_distributed_sampler=False))
    ran.fit(Model(), data(), data(2))
    with pytest.raises(RuntimeError, match="a copy of this GradientMonitor"):
        monitor.suggest_clip()
    assert next(one for one in ran.callbacks if isinstance(one, GradientMonitor)).suggest_clip() > 0.0


def test_a_copy_that_only_evaluates_changes_nothing() -> None:
    average = WeightAveraging(EMA(0.8))
    trainer([copy.deepcopy(average)]).validate(Model(), data(2), verbose=False)
    assert average.averaged_state() == {}


class FitsWithCopies(Callback):
    """Train another model, with copies of the running callbacks, before the first step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        fit(Model(), [copy.deepcopy(one) for one in trainer.callbacks if isinstance(one, OptimCallback)])


def test_the_fit_of_a_copy_within_a_fit_does_not_disturb_it() -> None:
    plain, disturbed = WeightAveraging(EMA(0.8), start=4), WeightAveraging(EMA(0.8), start=4)
    fit(one := Model(), [plain])
    fit(other := Model(), [disturbed, FitsWithCopies()])
    assert_equal(snapshot(other), snapshot(one))
    disturbed.averaged_state()


def test_copies_are_freed_with_their_trainer() -> None:
    mine = WeightAveraging(EMA(0.8))
    kept = weakref.ref(copied := copy.deepcopy(mine))
    gc.disable()
    try:
        ran = trainer([copied])
        ran.fit(Model(), data(), data(2))
        ran.callbacks.clear()
        del copied
        assert kept() is None, "something refers to the copy"
    finally:
        gc.enable()


def test_a_chain_of_copies_does_not_grow() -> None:
    one = GradientMonitor()
    for _ in range(20):
        one = copy.deepcopy(one)
    gc.collect()
    assert len(copy.deepcopy(one)._ancestors) <= 2
    assert len(pickle.dumps(one)) < 2 * len(pickle.dumps(GradientMonitor()))


def test_a_callback_without_the_constructor_of_the_base_class() -> None:
    class Careless(OptimCallback):
        def __init__(self) -> None:
            pass

    copied = copy.deepcopy(Careless())
    fit(Model(), [copied])
    assert copied.steps == [16]
    assert ran_elsewhere.find([""]) is None
