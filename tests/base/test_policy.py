"""The base class of policies: repr, identity, schedules, formulas, and one copy per optimizer."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim import (
    EMA,
    L1,
    L2,
    AnyOf,
    Average,
    ClipByNorm,
    ClipByValue,
    Clipping,
    Constant,
    Cosine,
    Criterion,
    Divergence,
    EarlyStopping,
    ElasticNet,
    Exponential,
    GradientClipping,
    Linear,
    NonFinite,
    NormClipping,
    Penalty,
    Piecewise,
    Plateau,
    Policy,
    Proximal,
    Threshold,
    WeightAveraging,
    WeightRegularization,
)
from lightning_optim.base import PerOptimizer
from lightning_optim.runtime.lightning.packages import version_of
from lightning_optim.stopping.improvement import Best
from tests.lightning import Trainer

ALL = [
    L1(1e-5, on="encoder.*"),
    L2(Linear(1e-3, 0.0), exclude=["head.*"]),
    ElasticNet(1e-5, 1e-4),
    ClipByNorm(1.0, norm_type=float("inf")),
    ClipByValue(Constant(0.5)),
    EMA(0.999, warmup=None),
    Plateau("val_loss", patience=5, mode="max", min_delta=0.1),
    Threshold("accuracy", 0.9, mode="max"),
    Divergence("loss", 10.0),
    AnyOf([NonFinite("loss"), Plateau("loss")]),
    Best({"loss": 1.0, "accuracy": -2.0}),
    Cosine(1.0, 0.0, begin=0.25),
    Exponential(1.0, 0.1, until=0.5),
    Piecewise({0.0: 1.0, 0.5: 0.1}),
]


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_prints_as_it_was_written(policy: Policy) -> None:
    again = eval(repr(policy), {**globals(), "inf": float("inf")})
    assert repr(again) == repr(policy)
    assert again.identity == policy.identity


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_copies(policy: Policy, copied) -> None:
    other = copied(policy)
    assert other is not policy
    assert vars(other).keys() >= {name for name in vars(policy) if not name.startswith("_")}
    assert other.identity == policy.identity
    assert other.state_dict() == policy.state_dict()


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_prints_the_same_after_pickling(policy: Policy) -> None:
    assert repr(pickle.loads(pickle.dumps(policy))) == repr(policy)


def test_prints_the_arguments_that_were_passed() -> None:
    assert repr(EMA(0.9)) == "EMA(decay=0.9)" and EMA(0.9).brief == "EMA(0.9)"
    assert repr(Plateau("x", patience=3)) == "Plateau('x', patience=3)"
    assert repr(Plateau(monitor="x", mode="max")) == "Plateau('x', mode='max')"
    assert EMA(half_life=5).brief == "EMA(half_life=5)"
    every_argument = {"monitor": "x", "patience": 3, "mode": "min", "min_delta": 0.5}  # as a configuration file passes
    assert repr(Plateau(**every_argument)) == "Plateau('x', min_delta=0.5)"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (L1(1e-5, on="a.*"), L1(1e-3, on="a.*")),
        (EMA(0.9), EMA(0.99, warmup=None)),
        (ClipByNorm(1.0), ClipByNorm(Linear(5.0, 1.0))),
        (Plateau("x", patience=3), Plateau("x", patience=30, min_delta=1.0)),
        (AnyOf([Plateau("x", patience=3)]), AnyOf([Plateau("x", patience=30)])),
    ],
)
def test_tuned_numbers_are_not_identity(one: Policy, other: Policy) -> None:
    assert one.identity == other.identity


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (L1(1e-5), L2(1e-5)),
        (L1(1e-5), L1(1e-5, on="*")),
        (L1(1e-5, on=nn.Linear), L1(1e-5, on=nn.Conv2d)),
        (L1(1e-5, on=["a", "b"]), L1(1e-5, on=["a", "c"])),
        (Plateau("x"), Plateau("y")),
        (Plateau("x"), Plateau("x", mode="max")),
        (AnyOf([Plateau("x")]), AnyOf([Plateau("x"), NonFinite("x")])),
        (Best(["x", "y"]), Best(["y", "x"])),
        (ClipByNorm(1.0), ClipByNorm(1.0, norm_type=1.0)),
    ],
)
def test_what_a_policy_acts_on_is_identity(one: Policy, other: Policy) -> None:
    assert one.identity != other.identity


def _is_bias(name: str, parameter: Tensor) -> bool:
    return name.endswith("bias")


def test_identity_holds_no_address() -> None:
    for selector in (_is_bias, nn.Linear, [nn.Linear, _is_bias]):
        assert " at 0x" not in L1(1e-5, on=selector).identity


def test_scheduled_says_whether_a_total_is_needed() -> None:
    assert L2(Linear(1.0, 0.0)).scheduled
    assert ElasticNet(0.1, Piecewise({0: 1.0})).scheduled
    assert not L2(1e-4).scheduled
    assert not L2(Constant(1e-4)).scheduled


def test_schedules_in_lists_and_nested_policies_are_seen() -> None:
    class Holds(Policy):
        def __init__(self, *held: object) -> None:
            self.held = held

    moving, still = Linear(1.0, 0.5), Constant(1.0)
    for held in ([moving], {"a": [still, moving]}, L2(moving), [ClipByNorm(1.0), ClipByNorm(moving)], (Holds(moving),)):
        assert Holds(held).scheduled
    for held in ([still], {"a": 1.0}, L2(still), [ClipByNorm(1.0), Plateau("x")], None):
        assert not Holds(held).scheduled


def test_a_formula_reads_schedules_at_the_present_step() -> None:
    class Shift(Clipping):
        def __init__(self, amount: object) -> None:
            self.amount = amount

        def _clip_(self, grads, weights) -> None:
            grads[0].add_(self.current(self.amount))
            self.seen = self._step, self._total

    grad, policy = torch.zeros(1), Shift(Linear(1.0, 0.0))
    assert policy.clip_([grad], norm=torch.tensor(7.0), step=1, total=3) == 7.0
    assert (grad.item(), policy.seen) == (0.5, (1, 3))
    Shift(2.0).clip_([grad])
    assert grad.item() == 2.5
    assert Shift(2.0).clip_([]) is None


@pytest.mark.parametrize("kind", [Clipping, NormClipping, Penalty, Proximal, Average, Criterion])
def test_a_base_class_says_which_formula_is_missing(kind: type[Policy]) -> None:
    class Empty(kind):
        pass

    weight, grad = torch.ones(2), torch.ones(2)
    calls = {
        Clipping: lambda one: one.clip_([grad]),
        NormClipping: lambda one: one.clip_([grad]),
        Penalty: lambda one: one.add_grad_([weight], [grad]),
        Proximal: lambda one: one.project_([weight], lr=0.1),
        Average: lambda one: [one.update_([weight], step=step) for step in (1, 2)],
        Criterion: lambda one: one.update({"x": 1.0}),
    }
    with pytest.raises(NotImplementedError, match=r"Empty has no `_?\w+\(self, "):
        calls[kind](Empty())


@pytest.mark.parametrize(
    ("kind", "callback", "methods"),
    [
        (Clipping, GradientClipping, ["_clip_"]),
        (Clipping, GradientClipping, ["clip_"]),
        (NormClipping, GradientClipping, ["_bound"]),
        (NormClipping, GradientClipping, ["bound"]),
        (NormClipping, GradientClipping, ["clip_"]),
        (Penalty, WeightRegularization, ["_value", "_add_grad_"]),
        (Penalty, lambda one: WeightRegularization([one]), ["value", "add_grad_"]),
        (Proximal, WeightRegularization, ["_project_"]),
        (Proximal, WeightRegularization, ["project_"]),
        (Average, WeightAveraging, ["_share"]),
        (Average, WeightAveraging, ["update_"]),
        (Criterion, lambda one: EarlyStopping(one, restore_best=False), ["update"]),
        (Criterion, lambda one: EarlyStopping(AnyOf([one]), restore_best=False), ["update"]),
    ],
)
def test_a_callback_refuses_a_policy_without_its_formula(kind: type, callback: Any, methods: list[str]) -> None:
    """The formula, or the public method around it, may also be in a class between."""

    class Between(kind):
        monitor = "x"

    for count in range(len(methods)):
        own = {name: lambda self, *args, **kwargs: None for name in methods[:count]}
        with pytest.raises(NotImplementedError, match=rf"Own must override `\w+` of {kind.__name__}"):
            callback(type("Own", (Between,), own)())
    whole = type("Own", (Between,), {name: lambda self, *args, **kwargs: None for name in methods})
    callback(type("Later", (whole,), {})())


@pytest.mark.parametrize("method", ["value", "add_grad_", "project_", "clip_", "clip_ by norm", "update_"])
def test_a_formula_is_computed_without_autocast(method: str) -> None:
    """Under manual optimization the step is made within the forward pass of Lightning, and so within autocast."""
    dtypes = []

    def product(*_: object) -> float:
        dtypes.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return 1.0

    kinds = {Penalty: ("_value", "_add_grad_"), Proximal: ("_project_",), Clipping: ("_clip_",)}
    kinds |= {NormClipping: ("_bound",), Average: ("_share",)}
    made = {kind: type("Product", (kind,), dict.fromkeys(names, product))() for kind, names in kinds.items()}
    weight, grad = torch.ones(2), torch.ones(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        {
            "value": lambda: made[Penalty].value([weight]),
            "add_grad_": lambda: made[Penalty].add_grad_([weight], [grad]),
            "project_": lambda: made[Proximal].project_([weight], lr=0.1),
            "clip_": lambda: made[Clipping].clip_([grad]),
            "clip_ by norm": lambda: made[NormClipping].clip_([grad]),
            "update_": lambda: [made[Average].update_([weight], step=step) for step in (1, 2)],
        }[method]()
        product()
    assert dtypes == [torch.float32, torch.bfloat16]


def test_one_copy_per_optimizer() -> None:
    template = EMA(0.9)
    copies = PerOptimizer([template])
    copies[1][0].update_([torch.ones(1)], step=1)
    assert copies[1][0].started
    assert copies[1] is copies[1]
    assert not copies[0][0].started
    assert not template.started


def test_state_of_copies_is_loaded_before_they_are_asked_for() -> None:
    saved = PerOptimizer([Plateau("x"), Threshold("x", 0.5)])
    saved[0][0].update({"x": 1.0})
    saved[1][0].update({"x": 2.0})
    loaded = PerOptimizer([Plateau("x"), Threshold("x", 0.5)])
    loaded.load_state_dict(saved.state_dict())
    assert [loaded[index][0].best for index in (0, 1)] == [1.0, 2.0]
    assert loaded.state_dict() == saved.state_dict()


def test_a_state_from_before_the_first_step_forgets_the_steps_since() -> None:
    copies = PerOptimizer([Plateau("x")])
    saved = copies.state_dict()
    copies[0][0].update({"x": 1.0})
    copies.load_state_dict(saved)
    assert copies[0][0].best == math.inf


def test_a_policy_without_memory_has_an_empty_state() -> None:
    assert L1(0.1).state_dict() == {}


def test_an_argument_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="EMA has no argument 'decy'; did you mean 'decay'"):
        EMA(decy=0.9)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'monitor'"):
        Plateau(patience=3)


asks_callbacks = pytest.mark.skipif(
    version_of(Trainer) < (2, 6), reason="the Trainer refuses what is no callback in its own words"
)


@asks_callbacks
@pytest.mark.parametrize("policy", [policy for policy in ALL if policy.used_in], ids=repr)
def test_a_trainer_is_told_where_a_policy_belongs(policy: Policy) -> None:
    callback = policy.in_its_place
    for callbacks in (policy, [policy]):
        with pytest.raises(
            TypeError, match=r"is a policy, not a callback: write|is a schedule: write it in place"
        ) as told:
            Trainer(callbacks=callbacks, logger=False, accelerator="cpu", enable_progress_bar=False)
        assert callback in str(told.value)
    if "<locals>" not in callback and "<lambda>" not in callback:
        eval(callback, {**vars(lightning_optim), **globals()})  # what the message says to write is no error


@asks_callbacks
def test_the_likeliest_first_mistake() -> None:
    with pytest.raises(TypeError) as told:
        Trainer(callbacks=[EMA(0.99)], logger=False, accelerator="cpu")
    assert str(told.value) == "EMA(decay=0.99) is a policy, not a callback: write WeightAveraging(EMA(0.99))"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("WeightAveraging(L2(0.1))", "L2(0.1) belongs in WeightRegularization(L2(0.1))"),
        ("GradientClipping(EMA(0.9))", "EMA(decay=0.9) belongs in WeightAveraging(EMA(0.9))"),
        ("GradientClipping([ClipByNorm(1.0), EMA(0.9)])", "EMA(decay=0.9) belongs in WeightAveraging(EMA(0.9))"),
        ("WeightRegularization([L2(0.1), Plateau('x')])", "Plateau('x') belongs in EarlyStopping(Plateau('x'))"),
        ("GradientAccumulation(ClipByNorm(1.0))", "ClipByNorm(1.0) belongs in GradientClipping(ClipByNorm(1.0))"),
        ("EarlyStopping(EMA(0.9))", "EMA(decay=0.9) belongs in WeightAveraging(EMA(0.9))"),
        ("AllOf([Plateau('x'), L2(0.1)])", "L2(0.1) belongs in WeightRegularization(L2(0.1))"),
        ("WeightAveraging(EMA)", "EMA is a class, so write EMA(…)"),
    ],
)
def test_a_policy_in_the_wrong_callback_is_told(wrong: str, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        eval(wrong, vars(lightning_optim))
    assert told in str(caught.value)


def test_large_arguments_are_not_written_out() -> None:
    class Fails:
        def __repr__(self) -> str:
            raise RuntimeError

    class Holds(Policy):
        def __init__(self, value: Any) -> None:
            self.value = value

    shown = {1: range(3), 2: torch.zeros(3), 3: list(range(10**6)), 4: Fails(), 5: nn.Linear(1, 1)}
    texts = [repr(Holds(value)) for value in shown.values()]
    assert texts == [
        "Holds(range(0, 3))",
        "Holds(<Tensor>)",
        "Holds([…, 1000000 items])",
        "Holds(<Fails>)",
        "Holds(<Linear>)",
    ]
    assert not hasattr(EMA(0.9), "state_key")
