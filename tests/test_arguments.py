"""Wrong arguments: a `ValueError` when it is made, with the argument, its value and what is allowed."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from lightning.pytorch import LightningModule

import lightning_optim
from lightning_optim import EMA, L1, ClipByNorm, Plateau, Policy, SharpnessAwareMixin
from tests.integration.entry_fits import CELL
from tests.registry import ALL_ENTRIES
from tests.test_matrix import parts


class Sharp(SharpnessAwareMixin, LightningModule):
    """A mixin is made with a module."""


NAMES: dict[str, Any] = {
    **{name: getattr(lightning_optim, name) for name in lightning_optim.__all__},
    "SharpnessAwareMixin": Sharp,
    "LightningModule": LightningModule,
    "nan": float("nan"),
    "inf": float("inf"),
}

# What is made, the argument at fault, its value as it is told, and a part of the sentence that says what is allowed.
WRONG: list[tuple[str, str, str, str]] = [
    # schedules
    ("Constant(nan)", "value", "nan", "must be a number that is finite"),
    ("Constant('a')", "value", "'a'", "must be a number that is finite"),
    ("Linear(nan, 1.0)", "start", "nan", "must be a number that is finite"),
    ("Linear(1.0, 0.0, begin=1.0)", "begin", "1.0", "in [0.0, 1.0)"),
    ("Cosine(1.0, inf)", "end", "inf", "must be a number that is finite"),
    ("Cosine(1.0, 0.0, begin=0.5, until=0.2)", "until", "0.2", "in (0.5, 1.0]"),
    ("Exponential(0.0, 1.0)", "start", "0.0", "> 0"),
    ("Exponential(1.0, -1.0)", "end", "-1.0", "> 0"),
    ("Piecewise({})", "values", "{}", "must be a dictionary of fraction of training to value"),
    ("Piecewise({0.5: 1.0})", "values", "{0.5: 1.0}", "a value that holds from the fraction 0 on"),
    ("Piecewise({0.0: 1.0, 2.0: 1.0})", "fraction in values", "2.0", "in [0.0, 1.0]"),
    # regularization
    ("WeightRegularization([])", "terms", "[]", "must be a penalty"),
    ("WeightRegularization(0.1)", "terms", "0.1", "such as L2(1e-4)"),
    ("WeightRegularization([L2(0.1), ClipByNorm(1.0)])", "terms", "[L2(strength=0.1", "must be a penalty"),
    ("L1(-0.1)", "strength", "-0.1", ">= 0"),
    ("L2(nan)", "strength", "nan", ">= 0"),
    ("L2(True)", "strength", "True", ">= 0"),
    ("L2('0.1')", "strength", "'0.1'", "a number (or a schedule of them)"),
    ("L2(Linear(1.0, -1.0))", "strength", "Linear(start=1.0, end=-1.0", ">= 0"),
    ("ElasticNet(-1.0, 0.1)", "l1", "-1.0", ">= 0"),
    ("ElasticNet(0.1, -1.0)", "l2", "-1.0", ">= 0"),
    ("ProximalL1(-2.0)", "strength", "-2.0", ">= 0"),
    ("DropPath(1.5)", "drop_prob", "1.5", "in [0.0, 1.0]"),
    ("ScheduledDropout({})", "rates", "{}", "must be a dictionary of glob to rate"),
    ("ScheduledDropout({'a.*': 2.0})", "rates['a.*']", "2.0", "in [0.0, 1.0]"),
    # gradients
    ("GradientClipping(0.0)", "policy", "0.0", "a number > 0"),
    ("GradientClipping([])", "policy", "[]", "a list of them"),
    ("GradientClipping(L2(0.1))", "policy", "L2(strength=0.1", "a clipping policy"),
    ("GradientClipping(1.0, nonfinite='no')", "nonfinite", "'no'", "must be one of"),
    ("GradientClipping(1.0, spike=1.0)", "spike", "1.0", "> 1.0"),
    ("GradientClipping(1.0, max_consecutive_skips=-1)", "max_consecutive_skips", "-1", "an integer >= 0"),
    ("ClipByNorm(-1.0)", "max_norm", "-1.0", "> 0"),
    ("ClipByNorm(1.0, norm_type=0)", "norm_type", "0", "> 0"),
    ("ClipByNorm(1.0, scope='all')", "scope", "'all'", "must be one of"),
    ("ClipByValue(0)", "value", "0", "> 0"),
    ("AGC(0.0)", "clipping", "0.0", "> 0"),
    ("AGC(eps=0)", "eps", "0", "> 0"),
    ("AutoClip(percentile=101.0)", "percentile", "101.0", "in [0.0, 100.0]"),
    ("AutoClip(history=0)", "history", "0", "an integer >= 1"),
    ("ZClip(z=0)", "z", "0", "> 0"),
    ("ZClip(decay=1.0)", "decay", "1.0", "in [0.0, 1.0)"),
    ("ZClip(warmup=0)", "warmup", "0", "an integer >= 1"),
    ("ZClip(release_after=0)", "release_after", "0", "an integer >= 1"),
    ("Noise(eta=-1.0)", "eta", "-1.0", ">= 0"),
    ("Noise(gamma=-1.0)", "gamma", "-1.0", ">= 0"),
    ("Noise(seed=-1)", "seed", "-1", "an integer >= 0"),
    ("GradientMonitor(level='all')", "level", "'all'", "must be one of"),
    ("GradientMonitor(history=0)", "history", "0", "an integer >= 1"),
    ("GradientAccumulation(0)", "n", "0", "an integer >= 1"),
    ("GradientAccumulation(2.0)", "n", "2.0", "an integer >= 1"),
    ("GradientAccumulation(True)", "n", "True", "an integer >= 1"),
    ("GradientAccumulation({})", "n", "{}", "a dictionary of epochs >= 0"),
    ("GradientAccumulation({-1: 2})", "n", "{-1: 2}", "a dictionary of epochs >= 0"),
    ("GradientAccumulation({0: 0})", "n", "{0: 0}", "a dictionary of epochs >= 0"),
    ("GradientAccumulation(2, weight_by='token')", "weight_by", "'token'", "must be 'batch'"),
    ("TargetBatchSize(0)", "size", "0", "an integer >= 1"),
    ("TargetBatchSize(8, micro_batch_size=0)", "micro_batch_size", "0", "an integer >= 1"),
    ("SharpnessAwareMixin(rho=0.0)", "rho", "0.0", "> 0"),
    # stopping
    ("EarlyStopping(3)", "monitor", "3", "must be a metric's name"),
    ("Plateau(None)", "monitor", "None", "must be a metric's name"),
    ("Threshold(3, 0.5)", "monitor", "3", "must be a metric's name"),
    ("Divergence(3, 0.5)", "monitor", "3", "must be a metric's name"),
    ("NonFinite(['x'])", "monitor", "['x']", "must be a metric's name"),
    ("EarlyStopping('x', patience=-1)", "patience", "-1", ">= 0"),
    ("EarlyStopping('x', patience=1.5)", "patience", "1.5", "an integer"),
    ("EarlyStopping('x', mode='lower')", "mode", "'lower'", "must be one of 'min', 'max'"),
    ("EarlyStopping('x', min_delta=nan)", "min_delta", "nan", "must be a number"),
    ("EarlyStopping('x', best_by=3)", "by", "3", "must be a metric's name"),
    ("EarlyStopping(Plateau('x'), patience=5)", "patience", "5", "belongs to the criterion"),
    ("Plateau('x', patience=-1)", "patience", "-1", "an integer >= 0"),
    ("Plateau('x', min_delta=-0.5)", "min_delta", "-0.5", ">= 0"),
    ("Plateau('x', mode='lower')", "mode", "'lower'", "must be one of 'min', 'max'"),
    ("Threshold('x', nan)", "value", "nan", "must be a number that is finite"),
    ("Threshold('x', 1.0, mode='lower')", "mode", "'lower'", "must be one of 'min', 'max'"),
    ("Divergence('x', inf)", "value", "inf", "must be a number that is finite"),
    ("AnyOf([])", "criteria", "[]", "a list of at least one criterion"),
    ("AllOf(Plateau('x'))", "criteria", "Plateau(monitor='x'", "a list of at least one criterion"),
    ("AtLeast(3, [NonFinite('x')])", "k", "3", "an integer in [1, 1]"),
    # averaging
    ("WeightAveraging(0.999)", "average", "0.999", "such as EMA(0.999)"),
    ("WeightAveraging(EMA(0.9), start=-1)", "start", "-1", ">= 0"),
    ("WeightAveraging(EMA(0.9), start=1.5)", "start", "1.5", "in [0.0, 1.0]"),
    ("WeightAveraging(EMA(0.9), every=0)", "every", "0", ">= 1"),
    ("WeightAveraging(EMA(0.9), buffers='all')", "buffers", "'all'", 'must be "average", "refresh", "copy" or None'),
    ("WeightAveraging(EMA(0.9), evaluate=False, compare=True)", "compare", "True", "the average that is evaluated"),
    ("EMA(1.0)", "decay", "1.0", "in [0.0, 1.0)"),
    ("EMA(0.9, half_life=3)", "half_life", "3", "either `decay` or `half_life`"),
    ("EMA(half_life=0)", "half_life", "0", "> 0"),
    ("EMA(0.9, warmup=0.0)", "warmup", "0.0", "> 0"),
    ("LAWA(0)", "size", "0", "an integer >= 1"),
    ("EMAWeightAveraging(decay=1.0)", "decay", "1.0", "in [0.0, 1.0)"),
    ("EMAWeightAveraging(update_every_n_steps=0)", "update_every_n_steps", "0", "an integer >= 1"),
    (
        "StochasticWeightAveraging(annealing_strategy='no')",
        "annealing_strategy",
        "'no'",
        "must be one of 'cos', 'linear'",
    ),
    ("StochasticWeightAveraging(swa_lrs=-1.0)", "swa_lrs", "-1.0", "> 0"),
    ("StochasticWeightAveraging(swa_epoch_start=0)", "swa_epoch_start", "0", "an integer >= 1"),
    ("CheckpointAveraging(top=0)", "top", "0", "an integer >= 2"),
    ("CheckpointAveraging(buffers='copy')", "buffers", "'copy'", "must be one of 'refresh', 'average'"),
    # ensembling
    ("Ensemble([])", "members", "list", "a list of at least one LightningModule"),
    ("Ensemble([3])", "members", "int", "must be LightningModules"),
    ("Ensemble([LightningModule()], outputs='labels')", "outputs", "'labels'", "must be one of"),
    ("Ensemble([LightningModule()], outputs='logits', dim=0.5)", "dim", "0.5", "an integer"),
    ("Disagreement('other')", "measure", "'other'", "'pairwise', 'mutual_information'"),
    ("Disagreement(outputs='labels')", "outputs", "'labels'", "'probabilities', 'logits'"),
]

# Base classes without arguments of their own, and what takes names, selections and switches only.
NOTHING_TO_REFUSE = {
    *("Average", "Clipping", "Criterion", "NormClipping", "OptimCallback", "Penalty", "Policy", "Proximal", "Schedule"),
    *("Centralize", "ExactResume", "ManualOptimizationMixin", "OptimizerStep", "RegularizationMixin", "SWA", "Slot"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case[0])
def test_wrong_argument(case: tuple[str, str, str, str]) -> None:
    made, argument, value, allowed = case
    with pytest.raises(ValueError) as caught:
        eval(made, NAMES)
    told = str(caught.value)
    assert f"`{argument}" in told
    assert re.search(rf"(got |got a |=){re.escape(value)}", told), "the value is not told"
    assert allowed in told


def test_each_public_class_is_here() -> None:
    """Or it is a policy, each argument of which is tried below."""
    classes = {name: getattr(lightning_optim, name) for name in lightning_optim.__all__}
    classes = {name: cls for name, cls in classes.items() if inspect.isclass(cls)}
    refused = {made.split("(")[0] for made, *_ in WRONG}
    assert {name for name, cls in classes.items() if not issubclass(cls, Policy)} <= refused | NOTHING_TO_REFUSE
    assert refused | NOTHING_TO_REFUSE <= set(classes)
    assert not refused & NOTHING_TO_REFUSE


IN_REGISTRY = [p for e in ALL_ENTRIES for cb in e.all_callbacks(CELL) for p in parts(cb) if isinstance(p, Policy)]
POLICIES = {type(p): p for p in IN_REGISTRY if type(p).__name__ in lightning_optim.__all__}
NUMBERS = [
    (policy, name)
    for policy in POLICIES.values()
    for name, parameter in inspect.signature(type(policy)).parameters.items()
    if re.match(r"(float|int)\b|Mode|Scope", str(parameter.annotation))
]


@pytest.mark.parametrize(("policy", "argument"), NUMBERS, ids=lambda value: value if isinstance(value, str) else None)
@pytest.mark.parametrize("wrong", [float("nan"), "neither", [1.0]], ids=repr)
def test_each_number_and_choice_of_a_policy_is_checked(policy: Policy, argument: str, wrong: Any) -> None:
    arguments = {name: getattr(policy, name) for name in inspect.signature(type(policy)).parameters}
    with pytest.raises(ValueError, match=rf"`{argument}`?") as caught:
        type(policy)(**{**arguments, argument: wrong})
    assert repr(wrong) in str(caught.value)


def test_policies_print_as_they_were_written() -> None:
    for policy in (L1(0.1), ClipByNorm(1.0, norm_type=float("inf")), EMA(0.9, warmup=None), Plateau("x", mode="max")):
        again = eval(repr(policy), {**vars(lightning_optim), "inf": float("inf")})
        assert isinstance(again, Policy)
        assert repr(again) == repr(policy)
