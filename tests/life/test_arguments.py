"""Wrong arguments: a `ValueError` when a callback is made, with the argument, its value and what is allowed."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import lightning_optim
from lightning_optim import (
    EMA,
    L1,
    L2,
    CheckpointAveraging,
    ClipByNorm,
    ClipByValue,
    EarlyStopping,
    ElasticNet,
    EMAWeightAveraging,
    ExactResume,
    GradientAccumulation,
    GradientClipping,
    GradientMonitor,
    Linear,
    OptimCallback,
    Plateau,
    Policy,
    ScheduledDropout,
    StochasticWeightAveraging,
    WeightAveraging,
    WeightRegularization,
)

NAN = float("nan")

# What is made, the argument at fault, and a part of the sentence that says what is allowed.
WRONG: list[tuple[Any, str, str]] = [
    (lambda: WeightRegularization([]), "terms", "must be a penalty"),
    (lambda: WeightRegularization(0.1), "terms", "such as L2(1e-4)"),
    (lambda: WeightRegularization([L2(0.1), ClipByNorm(1.0)]), "terms", "must be a penalty"),
    (lambda: L1(-0.1), "strength", ">= 0"),
    (lambda: L2(NAN), "strength", ">= 0"),
    (lambda: L2(True), "strength", ">= 0"),
    (lambda: L2("0.1"), "strength", "a number (or a schedule of them)"),
    (lambda: L2(Linear(1.0, -1.0)), "strength", ">= 0"),
    (lambda: ElasticNet(0.1, -1.0), "l2", ">= 0"),
    (lambda: GradientClipping(0.0), "policy", "a number > 0"),
    (lambda: GradientClipping([]), "policy", "a list of them"),
    (lambda: GradientClipping(L2(0.1)), "policy", "a clipping policy"),
    (lambda: GradientClipping(1.0, nonfinite="no"), "nonfinite", "must be one of"),
    (lambda: ClipByNorm(-1.0), "max_norm", "> 0"),
    (lambda: ClipByNorm(1.0, norm_type=0), "norm_type", "> 0"),
    (lambda: ClipByValue(0), "value", "> 0"),
    (lambda: GradientMonitor(level="all"), "level", "must be one of"),
    (lambda: GradientAccumulation(0), "n", "an integer >= 1"),
    (lambda: GradientAccumulation(2.0), "n", "an integer >= 1"),
    (lambda: GradientAccumulation(True), "n", "an integer >= 1"),
    (lambda: GradientAccumulation({}), "n", "a dictionary of epochs >= 0"),
    (lambda: GradientAccumulation({-1: 2}), "n", "a dictionary of epochs >= 0"),
    (lambda: GradientAccumulation({0: 0}), "n", "a dictionary of epochs >= 0"),
    (lambda: GradientAccumulation(2, weight_by="token"), "weight_by", "must be 'batch'"),
    (lambda: EarlyStopping("x", patience=-1), "patience", ">= 0"),
    (lambda: EarlyStopping("x", patience=1.5), "patience", "an integer"),
    (lambda: EarlyStopping("x", mode="lower"), "mode", "'min' or 'max'"),
    (lambda: EarlyStopping("x", min_delta=NAN), "min_delta", "must be a number"),
    (lambda: EarlyStopping(Plateau("x"), patience=5), "patience", "belongs to a plain `monitor`"),
    (lambda: WeightAveraging(0.999), "average", "such as EMA(0.999)"),
    (lambda: WeightAveraging(EMA(0.9), start=-1), "start", ">= 0"),
    (lambda: WeightAveraging(EMA(0.9), start=1.5), "start", "in [0.0, 1.0]"),
    (lambda: WeightAveraging(EMA(0.9), every=0), "every", ">= 1"),
    (lambda: EMA(1.0), "decay", "in [0.0, 1.0)"),
    (lambda: EMA(0.9, warmup=0.0), "warmup", "> 0"),
    (lambda: EMAWeightAveraging(decay=1.0), "decay", "in [0.0, 1.0)"),
    (lambda: StochasticWeightAveraging(annealing_strategy="none"), "annealing_strategy", "must be"),
    (lambda: CheckpointAveraging(top=0), "top", "must be"),
    (lambda: ScheduledDropout({}), "rates", "must be a dictionary"),
]


def _id(case: tuple[Any, str, str]) -> str:
    made = re.search(r"lambda: (.*), \"", inspect.getsource(case[0]))
    return made[1] if made else case[1]


@pytest.mark.parametrize("case", WRONG, ids=_id)
def test_wrong_argument(case: tuple[Any, str, str]) -> None:
    make, argument, allowed = case
    with pytest.raises(ValueError, match=f"`{argument}") as caught:
        make()
    assert allowed in str(caught.value)


def test_the_value_is_told() -> None:
    for make, value in ((lambda: L2(-0.25), "-0.25"), (lambda: GradientAccumulation(-3), "-3"), (lambda: EMA(7), "7")):
        with pytest.raises(ValueError, match=re.escape(value)):
            make()


def test_each_public_callback_is_here() -> None:
    """But those that have nothing to refuse."""
    public = {getattr(lightning_optim, name) for name in lightning_optim.__all__}
    callbacks = {cls for cls in public if inspect.isclass(cls) and issubclass(cls, OptimCallback)}
    told = " ".join(_id(case) for case in WRONG)
    assert {cls for cls in callbacks if f"{cls.__name__}(" not in told} == {OptimCallback, ExactResume}


def test_policies_print_as_they_were_written() -> None:
    for policy in (L1(0.1), ClipByNorm(1.0, norm_type=float("inf")), EMA(0.9, warmup=None), Plateau("x", mode="max")):
        again = eval(repr(policy), {**vars(lightning_optim), "inf": float("inf")})
        assert isinstance(again, Policy)
        assert repr(again) == repr(policy)
