"""Each refused combination raises its sentence, and changes neither Trainer, weights nor callbacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from lightning_optim import (
    EMA,
    L2,
    ActivationRegularization,
    ClipByNorm,
    Clipping,
    EarlyStopping,
    Flooding,
    GradientAccumulation,
    GradientClipping,
    Linear,
    OptimCallback,
    Slot,
    WeightAveraging,
    WeightRegularization,
)
from lightning_optim.runtime.refusals import refuse_setup
from tests.harness import models, run
from tests.harness.cells import Cell
from tests.harness.process_group import Group
from tests.integration.entry_fits import CELL, Fitted, build, differences, each_entry, prepare
from tests.integration.forked_processes import results
from tests.integration.installed import settings
from tests.lightning import (
    PACKAGE,
    Callback,
    DeepSpeedStrategy,
    FSDPStrategy,
    GradientAccumulationScheduler,
    MisconfigurationException,
    Trainer,
    XLAStrategy,
)
from tests.lightning import StochasticWeightAveraging as LightningSWA
from tests.lightning import WeightAveraging as LightningWeightAveraging
from tests.registry import BY_NAME, Entry

STEPS = Cell("automatic", "32-true", "single", "1")


def assert_refused(fitted: Fitted, sentence: str) -> None:
    """Assert that the fit raises this sentence and leaves settings, weights and callbacks as they were."""
    weights, before = models.full_weights(fitted.module), settings(fitted.trainer)
    with pytest.raises(MisconfigurationException, match=sentence):
        fitted.trainer.fit(fitted.module)
    assert not differences(models.full_weights(fitted.module), weights)
    assert settings(fitted.trainer) == before
    assert all(callback.fit is None for callback in fitted.ours)


class SecondOrder:
    def configure_optimizers(self: Any) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@each_entry
def test_lbfgs(entry: Entry) -> None:
    """LBFGS computes several gradients within a step: only callbacks that act on neither gradients nor weights work."""
    fitted = prepare(entry, STEPS, SecondOrder, callbacks=entry.callbacks(STEPS))
    if any(callback.touches for callback in fitted.ours if not isinstance(callback, EarlyStopping)):
        assert_refused(fitted, "acts once per optimizer step, and LBFGS .* use a first-order optimizer")
    elif any(isinstance(callback, ActivationRegularization | Flooding) for callback in fitted.ours):
        assert_refused(fitted, "line search of LBFGS .* use a first-order optimizer")
    else:
        fitted.trainer.fit(fitted.module)
        assert all(callback.steps == [fitted.trainer.global_step] for callback in fitted.ours)


@each_entry
@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy, XLAStrategy])
def test_strategies_that_hide_weights(entry: Entry, strategy: type) -> None:
    """DeepSpeed and XLA are not installed: the strategy is made without its constructor."""
    trainer = run.make_trainer(CELL, [])
    connector = trainer._accelerator_connector
    connector.strategy = strategy.__new__(strategy)  # type: ignore[attr-defined]
    use = {DeepSpeedStrategy: "DeepSpeed hides", FSDPStrategy: "FSDP1 hides", XLAStrategy: "XLA is not tested"}[
        strategy
    ]
    for callback in entry.all_callbacks(CELL):
        assert isinstance(callback, OptimCallback)
        if callback.touches:
            with pytest.raises(MisconfigurationException, match=f"{use}.*; use .*`ModelParallelStrategy`"):
                callback.setup(trainer, build(CELL), "fit")
        else:
            refuse_setup(callback, trainer)


def test_stopping_with_a_directory_works_where_weights_are_hidden() -> None:
    trainer = run.make_trainer(CELL, [])
    trainer._accelerator_connector.strategy = FSDPStrategy.__new__(FSDPStrategy)
    refuse_setup(EarlyStopping("x", dirpath="best"), trainer)
    refuse_setup(EarlyStopping("x", restore_best=False), trainer)
    with pytest.raises(MisconfigurationException, match="FSDP1"):
        refuse_setup(EarlyStopping("x"), trainer)


class OnTheCPU(FSDPStrategy):
    """FSDP1 on the CPU: Lightning asks for a GPU only if the strategy is of the class itself."""


def under_fsdp1() -> str:
    clipping = GradientClipping(1.0)
    trainer = run.make_trainer(CELL, [clipping], strategy=OnTheCPU(), plugins=[run.LivingEnvironment()], devices=2)
    try:
        trainer.fit(build(CELL))
    except MisconfigurationException as error:
        return str(error) if clipping.fit is None else "left behind"
    return "nothing"


def test_fsdp1_in_two_processes() -> None:
    for message in results(2, under_fsdp1):
        assert message.startswith("GradientClipping acts on gradients: FSDP1 hides parameters in flat shards; use")


def averages() -> list[Callback]:
    return [WeightAveraging(EMA(0.9), name="slow"), WeightAveraging(EMA(0.5), name="fast")]


TWICE: dict[str, Any] = {
    "two clippings": (
        [GradientClipping(1.0, name="a"), GradientClipping(2.0, name="b")],
        {},
        "clip the same gradients",
    ),
    "clipping flag": (
        [GradientClipping(1.0)],
        {"gradient_clip_val": 0.5},
        r"gradient_clip_val=0.5.* remove the argument",
    ),
    "two accumulations": (
        [GradientAccumulation(2, name="a"), GradientAccumulation(3, name="b")],
        {},
        "Two GradientAccumulation callbacks accumulate: keep one",
    ),
    "accumulation flag": (
        [GradientAccumulation(2)],
        {"accumulate_grad_batches": 3},
        "accumulate_grad_batches=3.* remove the argument",
    ),
    "Lightning's accumulation": (
        [GradientAccumulation(2), GradientAccumulationScheduler({0: 2})],
        {},
        f"GradientAccumulation and the GradientAccumulationScheduler of `{PACKAGE}` both accumulate: "
        "give GradientAccumulation the dictionary of epochs to sizes",
    ),
    "two averages": (averages(), {}, "Two averages have `evaluate=True`.*: give the rest `evaluate=False`"),
    "Lightning's average": (
        [averages()[0], LightningWeightAveraging],
        {},
        f"WeightAveraging of `{PACKAGE}` both write",
    ),
    "Lightning's SWA": ([averages()[0], LightningSWA(0.1)], {}, f"StochasticWeightAveraging of `{PACKAGE}` both"),
}


@pytest.mark.parametrize("what", TWICE)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_same_job_twice(what: str, backwards: bool) -> None:
    listed, options, sentence = TWICE[what]
    callbacks = [one() if isinstance(one, type) else one for one in listed]
    ordered = list(reversed(callbacks)) if backwards else callbacks
    assert_refused(prepare(BY_NAME["plain"], STEPS, callbacks=ordered, **options), sentence)


class Estimator:
    """Makes its Trainer with arguments of its own, which the user's replace, as estimators of other packages do."""

    def __init__(self, **trainer_kwargs: Any) -> None:
        self.trainer_kwargs = {"gradient_clip_val": 10.0, "accumulate_grad_batches": 3, **trainer_kwargs}

    def fitted(self) -> Fitted:
        fitted = prepare(BY_NAME["plain"], STEPS, **self.trainer_kwargs)
        fitted.trainer.fit(fitted.module)
        return fitted


@pytest.mark.parametrize(
    ("argument", "off", "make"),
    [
        ("gradient_clip_val", None, lambda: GradientClipping(1.0)),
        ("accumulate_grad_batches", 1, lambda: GradientAccumulation(2)),
    ],
)
def test_the_same_job_is_set_by_a_package(argument: str, off: Any, make: Any) -> None:
    way_out = (
        rf"`{PACKAGE}\.Trainer\({argument}=.*If a package makes the Trainer.*pass `{argument}={off}` to the package"
    )
    with pytest.raises(MisconfigurationException, match=way_out):
        Estimator(callbacks=[make()]).fitted()
    callback = make()
    Estimator(callbacks=[callback], **{argument: off}).fitted()  # as the sentence says
    assert callback.steps


def test_an_average_that_is_not_evaluated_may_be_there_twice() -> None:
    one, other = averages()[0], WeightAveraging(EMA(0.5), evaluate=False, name="fast")
    fitted = prepare(BY_NAME["plain"], STEPS, callbacks=[one, other])
    fitted.trainer.fit(fitted.module)
    assert one.steps == other.steps == [8]  # type: ignore[attr-defined]


class InSlotOfAverages(OptimCallback):
    """A user's callback that acts after projections, as averages do."""

    slot = Slot.AVERAGE


@pytest.mark.parametrize("backwards", [False, True])
def test_a_users_callback_in_the_slot_of_averages_is_no_average(backwards: bool) -> None:
    callbacks: list[Any] = [InSlotOfAverages(), WeightAveraging(EMA(0.9), evaluate=False)]
    fitted = prepare(BY_NAME["plain"], STEPS, callbacks=callbacks[::-1] if backwards else callbacks)
    fitted.trainer.fit(fitted.module)
    assert [callback.steps for callback in callbacks] == [[8], [8]]


class Alone(models.Model):
    """Manual optimization without the mixin."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self.automatic_optimization = False


def test_accumulation_of_manual_steps_needs_the_mixin() -> None:
    fitted = prepare(BY_NAME["plain"], STEPS, callbacks=[GradientAccumulation(2)])
    fitted.module = Alone(STEPS)
    sentence = (
        "needs a module that steps with `ManualOptimizationMixin.optimize.*; Alone has no such method.* Write `class"
    )
    assert_refused(fitted, sentence)


ENDLESS = [
    WeightRegularization(L2(Linear(1e-3, 0.0))),
    GradientClipping(ClipByNorm(Linear(5.0, 1.0))),
    WeightAveraging(EMA(0.9), start=0.5),
]


@pytest.mark.parametrize("callback", ENDLESS, ids=lambda callback: type(callback).__name__)
@pytest.mark.parametrize("known_before", [True, False])
def test_a_schedule_needs_an_end(callback: Any, known_before: bool) -> None:
    fitted = prepare(
        BY_NAME["plain"], STEPS, callbacks=[callback], max_epochs=-1 if known_before else 2, val_check_interval=2
    )
    fitted.module.train_dataloader = lambda: iter(models.Model.train_dataloader(fitted.module))
    assert_refused(
        fitted,
        r"length of this run is unknown: set `Trainer\(max_steps=…\)`, or `max_epochs` with data that have a length or"
        " with `limit_train_batches=…`",
    )
    finite = prepare(BY_NAME["plain"], STEPS, callbacks=[callback], max_epochs=-1, max_steps=4)
    finite.trainer.fit(finite.module)
    assert callback.steps == [4]


class Stream:
    """A loader without a length."""

    def __init__(self, loader: models.Batches) -> None:
        self.batches = loader.batches

    def __iter__(self) -> Any:
        return iter(self.batches)


@pytest.mark.parametrize("callback", ENDLESS, ids=lambda callback: type(callback).__name__)
def test_a_number_of_batches_gives_data_without_a_length_an_end(callback: Any) -> None:
    fitted = prepare(BY_NAME["plain"], STEPS, callbacks=[callback], max_epochs=2, limit_train_batches=3)
    fitted.module.train_dataloader = lambda: Stream(models.Model.train_dataloader(fitted.module))
    fitted.trainer.fit(fitted.module)
    assert callback.steps == [6]


@each_entry
def test_two_of_one_identity_need_a_name(entry: Entry) -> None:
    """Lightning's Trainer refuses them in its constructor; with `name=` they are distinct."""
    for index, one in enumerate(entry.callbacks(STEPS)):
        twin = entry.callbacks(STEPS)[index]
        with pytest.raises(RuntimeError, match="more than one stateful callback"):
            Trainer(callbacks=[one, twin], accelerator="cpu", logger=False, enable_checkpointing=False)
        twin.name = "twin"  # type: ignore[attr-defined]
        Trainer(callbacks=[one, twin], accelerator="cpu", logger=False, enable_checkpointing=False)
        assert one.state_key != twin.state_key
        assert "twin" in twin.state_key


def partly_sharded() -> list[str]:
    """Return the warnings of a fit in which only one layer is sharded."""
    import warnings

    class Partly(models.Model):
        def configure_model(self) -> None:
            fully_shard(self.net.inner)

    cell = Cell("automatic", "32-true", "fsdp2", "1")
    trainer = run.make_trainer(cell, [GradientClipping(1.0)], max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Partly(cell))
    return [str(warning.message) for warning in caught if "fully_shard" in str(warning.message)]


def test_plain_parameters_under_fsdp2_are_warned_of_by_name(group: Group) -> None:
    said, silent = group.run(partly_sharded)
    assert len(said) == 1, said
    assert "['net.scale', 'net.outer.weight', 'net.outer.bias']" in said[0]
    assert silent == [], "rank 0 says it for all"


class Whole(Clipping):
    """Do nothing, on whole matrices only."""

    needs = "matrices"

    def _clip_(self, grads: Any, weights: Any) -> None:
        pass


def refused_under_fsdp2(policy: Clipping) -> str:
    cell = Cell("automatic", "32-true", "fsdp2", "1")
    trainer = run.make_trainer(cell, [GradientClipping(policy)], max_epochs=1)
    try:
        trainer.fit(models.build(cell))
    except MisconfigurationException as refusal:
        return str(refusal)
    return ""


def test_a_clipping_of_whole_matrices_is_refused_where_these_are_sharded(group: Group) -> None:
    for said in group.run(refused_under_fsdp2, Whole()):
        assert "Whole() is computed on whole matrices" in said and "leave it out with `exclude=`" in said
    assert group.run(refused_under_fsdp2, Whole(exclude="*")) == ["", ""], "as the error says"
