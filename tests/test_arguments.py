"""A wrong argument of a public class is a `ValueError` that names the argument, its value and what is allowed."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
from torch import nn

import lightning_optim
from lightning_optim import Policy, SharpnessAwareMixin
from tests.harness.cells import CELLS
from tests.lightning import LightningModule
from tests.registry import ALL_ENTRIES, parts_of


class Sharp(SharpnessAwareMixin, LightningModule):
    """A module with the mixin, since the mixin alone cannot be made."""


NAMES: dict[str, Any] = {
    **{name: getattr(lightning_optim, name) for name in lightning_optim.__all__},
    "SharpnessAwareMixin": Sharp,
    "LightningModule": LightningModule,
    "nn": nn,
    "nan": float("nan"),
    "inf": float("inf"),
}

# An expression that fails, the wrong argument, its value in the message, and the words that say what is allowed.
WRONG: list[tuple[str, str, str, str]] = [
    # schedules
    ("Constant(nan)", "value", "nan", "must be a number that is finite"),
    ("Constant('a')", "value", "'a'", "must be a number that is finite"),
    ("Linear(nan, 1.0)", "start", "nan", "must be a number that is finite"),
    ("Linear(1.0, 0.0, begin=1.0)", "begin", "1.0", "in [0.0, 1.0)"),
    ("Linear(1.0, inf)", "end", "inf", "must be a number that is finite"),
    ("Linear(1.0, 0.0, until=0.0)", "until", "0.0", "in (0.0, 1.0]"),
    ("Cosine(nan, 1.0)", "start", "nan", "must be a number that is finite"),
    ("Cosine(1.0, 0.0, begin=-0.1)", "begin", "-0.1", "in [0.0, 1.0)"),
    ("Cosine(1.0, inf)", "end", "inf", "must be a number that is finite"),
    ("Cosine(1.0, 0.0, begin=0.5, until=0.2)", "until", "0.2", "in (0.5, 1.0]"),
    ("Exponential(0.0, 1.0)", "start", "0.0", "> 0"),
    ("Exponential(1.0, -1.0)", "end", "-1.0", "> 0"),
    ("Exponential(1.0, 0.5, begin=1.0)", "begin", "1.0", "in [0.0, 1.0)"),
    ("Exponential(1.0, 0.5, until=2.0)", "until", "2.0", "in (0.0, 1.0]"),
    ("Piecewise({})", "values", "{}", "must be a dictionary of fraction of training to value"),
    ("Piecewise({0.5: 1.0})", "values", "{0.5: 1.0}", "a value that holds from the fraction 0 on"),
    ("Piecewise({0.0: 1.0, 2.0: 1.0})", "fraction in values", "2.0", "in [0.0, 1.0]"),
    # regularization
    ("L2(0.1, on=nn.Linear(2, 2))", "on", "<Linear>", "must be a glob over parameter names, a module class"),
    ("L2(Linear)", "strength", "<class 'lightning_optim.Linear'>", "must be a number (or a schedule of them)"),
    ("ActivationRegularization(L1(0.1), nn.Linear(2, 2))", "on", "<Linear>", "must be a glob over module names"),
    ("WeightRegularization([])", "terms", "[]", "must be a penalty"),
    ("WeightRegularization(0.1)", "terms", "0.1", "such as L2(1e-4)"),
    ("WeightRegularization([L2(0.1), ClipByNorm(1.0)])", "terms", "[L2(0.1", "must be a penalty"),
    ("ActivationRegularization(0.1, 'encoder.*')", "terms", "0.1", "must be a penalty such as L1(1e-5)"),
    ("ActivationRegularization([], 'encoder.*')", "terms", "[]", "or a list of them"),
    ("ActivationRegularization(ClipByNorm(1.0), '*')", "terms", "ClipByNorm(1.0)", "must be a penalty"),
    (
        "ActivationRegularization(GroupLasso(0.1), '*')",
        "terms",
        "GroupLasso(0.1)",
        "must act on each element",
    ),
    ("ActivationRegularization(L1(0.1, on='*'), '*')", "terms", "L1(0.1, on='*')", "must not choose parameters"),
    ("ActivationRegularization(L1(0.1), on=3)", "on", "3", "must be a glob over module names, a module class"),
    ("ActivationRegularization(L1(0.1), on=[])", "on", "[]", "a list of one or more of these"),
    ("Flooding(nan)", "level", "nan", "that is finite"),
    ("L1(-0.1)", "strength", "-0.1", ">= 0"),
    ("L2(nan)", "strength", "nan", ">= 0"),
    ("L2(True)", "strength", "True", ">= 0"),
    ("L2('0.1')", "strength", "'0.1'", "a number (or a schedule of them)"),
    ("L2(Linear(1.0, -1.0))", "strength", "Linear(1.0, -1.0", ">= 0"),
    ("ElasticNet(-1.0, 0.1)", "l1", "-1.0", ">= 0"),
    ("ElasticNet(0.1, -1.0)", "l2", "-1.0", ">= 0"),
    ("ProximalL1(-2.0)", "strength", "-2.0", ">= 0"),
    ("DropBlock(1.5)", "drop_prob", "1.5", "in [0.0, 1.0]"),
    ("DropBlock(0.1, block_size=0)", "block_size", "0", "an integer >= 1"),
    ("DropPath(1.5)", "drop_prob", "1.5", "in [0.0, 1.0]"),
    ("ScheduledDropout({})", "rates", "{}", "must be a rate or a dictionary of glob to rate"),
    ("ScheduledDropout({3: 0.1})", "rates", "{3: 0.1}", "must be a rate or a dictionary of glob to rate"),
    ("ScheduledDropout('0.1')", "rates", "'0.1'", "must be a rate or a dictionary of glob to rate"),
    ("ScheduledDropout(L2(0.1))", "rates", "L2(0.1)", "must be a rate or a dictionary of glob to rate"),
    ("ScheduledDropout(1.5)", "rates", "1.5", "in [0.0, 1.0]"),
    ("ScheduledDropout(True)", "rates", "True", "in [0.0, 1.0]"),
    ("ScheduledDropout({'a.*': 2.0})", "rates['a.*']", "2.0", "in [0.0, 1.0]"),
    ("ScheduledDropout(0.1, insert='blocks')", "insert", "'blocks'", "must be one of True, False, 'block', 'weight'"),
    ("ScheduledDropout(0.1, block_size=1.5)", "block_size", "1.5", "an integer >= 1"),
    ("WeightDrop(0.5)", "module", "0.5", "must be a layer that has weights of its own"),
    ("WeightDrop(Linear(0.0, 1.0))", "module", "Linear(0.0, 1.0)", "must be a layer that has weights of its own"),
    ("WeightDrop(nn.Linear(2, 2), drop_prob=-0.5)", "drop_prob", "-0.5", "in [0.0, 1.0]"),
    # gradients
    ("GradientClipping(0.0)", "policy", "0.0", "a number > 0"),
    ("GradientClipping([])", "policy", "[]", "a list of them"),
    ("GradientClipping(L2(0.1))", "policy", "L2(0.1", "a clipping policy"),
    ("GradientClipping(1.0, nonfinite='no')", "nonfinite", "'no'", "must be one of"),
    ("GradientClipping(1.0, spike=1.0)", "spike", "1.0", "> 1.0"),
    ("GradientClipping(1.0, max_consecutive_skips=-1)", "max_consecutive_skips", "-1", "an integer >= 0"),
    ("ClipByNorm(-1.0)", "max_norm", "-1.0", "> 0"),
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
    ("EarlyStopping(Plateau('x'), mode='lower')", "mode", "'lower'", "must be one of 'min', 'max'"),
    ("EarlyStopping('x', min_delta=nan)", "min_delta", "nan", "must be a number"),
    ("EarlyStopping('x', stopping_threshold=nan)", "stopping_threshold", "nan", "must be a number that is finite"),
    ("EarlyStopping('x', divergence_threshold='a')", "divergence_threshold", "'a'", "must be a number that is finite"),
    ("EarlyStopping('x', dirpath=3)", "dirpath", "3", "must be the path of a directory"),
    ("EarlyStopping('x', best_by=3)", "best_by", "3", "must be a metric's name"),
    ("EarlyStopping('x', best_by=[3])", "best_by", "[3]", "must be a metric's name"),
    ("EarlyStopping(Plateau('x'), patience=5)", "patience", "5", "belongs to the criterion"),
    ("Plateau('x', patience=-1)", "patience", "-1", "an integer >= 0"),
    ("Plateau('x', min_delta=-0.5)", "min_delta", "-0.5", ">= 0"),
    ("Plateau('x', mode='lower')", "mode", "'lower'", "must be one of 'min', 'max'"),
    ("Threshold('x', nan)", "value", "nan", "must be a number that is finite"),
    ("Threshold('x', 1.0, mode='lower')", "mode", "'lower'", "must be one of 'min', 'max'"),
    ("Divergence('x', inf)", "value", "inf", "must be a number that is finite"),
    ("Divergence('x', 1.0, mode='lower')", "mode", "'lower'", "must be one of 'min', 'max'"),
    ("AnyOf([])", "criteria", "[]", "one criterion or more"),
    ("AllOf(Plateau)", "criteria", "<class 'lightning_optim.Plateau'>", "one criterion or more"),
    ("AtLeast(1, [3])", "criteria", "[3]", "one criterion or more"),
    ("AtLeast(3, [NonFinite('x')])", "k", "3", "an integer in [1, 1]"),
    # averaging
    ("WeightAveraging(0.999)", "average", "0.999", "such as EMA(0.999)"),
    ("WeightAveraging(EMA(0.9), start=-1)", "start", "-1", ">= 0"),
    ("WeightAveraging(EMA(0.9), start=1.5)", "start", "1.5", "in [0.0, 1.0]"),
    ("WeightAveraging(EMA(0.9), every=0)", "every", "0", ">= 1"),
    ("WeightAveraging(EMA(0.9), device='x')", "device", "'x'", "must be one that torch knows"),
    ("WeightAveraging(EMA(0.9), dtype='int8')", "dtype", "'int8'", "must be a floating dtype"),
    ("WeightAveraging(EMA(0.9), refresh_batches=0)", "refresh_batches", "0", "an integer >= 1"),
    ("WeightAveraging(EMA(0.9), refresh_loader=3)", "refresh_loader", "3", "which can be iterated"),
    ("WeightAveraging(EMA(0.9), buffers='all')", "buffers", "'all'", 'must be "average", "refresh", "copy" or None'),
    ("WeightAveraging(EMA(0.9), evaluate=False, compare=True)", "compare", "True", "with the evaluated average"),
    ("EMA(1.0)", "decay", "1.0", "in [0.0, 1.0)"),
    ("EMA(0.9, half_life=3)", "half_life", "3", "either `decay` or `half_life`"),
    ("EMA(half_life=0)", "half_life", "0", "> 0"),
    ("EMA(0.9, warmup=0.0)", "warmup", "0.0", "> 0"),
    ("LAWA(0)", "size", "0", "an integer >= 1"),
    ("EMAWeightAveraging(decay=1.0)", "decay", "1.0", "in [0.0, 1.0)"),
    ("EMAWeightAveraging(device='x')", "device", "'x'", "must be one that torch knows"),
    ("EMAWeightAveraging(update_starting_at_step=-1)", "update_starting_at_step", "-1", "an integer >= 0"),
    ("EMAWeightAveraging(update_starting_at_epoch=0.5)", "update_starting_at_epoch", "0.5", "an integer >= 0"),
    ("EMAWeightAveraging(update_every_n_steps=0)", "update_every_n_steps", "0", "an integer >= 1"),
    (
        "StochasticWeightAveraging(annealing_strategy='no')",
        "annealing_strategy",
        "'no'",
        "must be one of 'cos', 'linear'",
    ),
    ("StochasticWeightAveraging(annealing_epochs=-1)", "annealing_epochs", "-1", "an integer >= 0"),
    ("StochasticWeightAveraging(avg_fn=3)", "avg_fn", "3", "must be a function"),
    ("StochasticWeightAveraging(device='x')", "device", "'x'", "must be one that torch knows"),
    ("StochasticWeightAveraging(refresh_batches=0)", "refresh_batches", "0", "an integer >= 1"),
    ("StochasticWeightAveraging(refresh_loader=3)", "refresh_loader", "3", "which can be iterated"),
    ("StochasticWeightAveraging(swa_lrs=-1.0)", "swa_lrs", "-1.0", "> 0"),
    ("StochasticWeightAveraging(swa_epoch_start=0)", "swa_epoch_start", "0", "an integer >= 1"),
    ("CheckpointAveraging(top=0)", "top", "0", "an integer >= 2"),
    ("CheckpointAveraging(monitor=3)", "monitor", "3", "must be a metric's name"),
    ("CheckpointAveraging(refresh_batches=0)", "refresh_batches", "0", "an integer >= 1"),
    ("CheckpointAveraging(refresh_loader=3)", "refresh_loader", "3", "which can be iterated"),
    ("CheckpointAveraging(buffers='copy')", "buffers", "'copy'", "must be one of 'refresh', 'average'"),
    # ensembling
    ("Ensemble([])", "members", "list", "a list of at least one LightningModule"),
    ("Ensemble([3])", "members", "int", "must be LightningModules"),
    ("Ensemble([LightningModule()], outputs='labels')", "outputs", "'labels'", "must be one of"),
    ("Ensemble([LightningModule()], outputs='logits', on=3)", "on", "3", "must be the name of a submodule"),
    ("Ensemble([LightningModule()], outputs='logits', dim=0.5)", "dim", "0.5", "an integer"),
    ("Disagreement('other')", "measure", "'other'", "'pairwise', 'mutual_information'"),
    ("Disagreement(outputs='labels')", "outputs", "'labels'", "'probabilities', 'logits'"),
]

# Arguments that a base class checks: each class that has one must pass it on.
OF_BASES = {
    "name": ("3", "must be text that tells two callbacks of one class apart"),
    "on": ("3", "must be a glob over parameter names, a module class, a predicate"),
    "exclude": ("['a', 3]", "must be a glob over parameter names, a module class, a predicate"),
    "norm_type": ("0", "> 0"),
    "scope": ("'all'", "must be one of 'global', 'group', 'tensor'"),
}
REQUIRED = {
    **{"EarlyStopping": "'x', ", "GradientAccumulation": "2, ", "GradientClipping": "1.0, "},
    **{
        "ActivationRegularization": "L1(0.1), '*', ",
        "Flooding": "0.1, ",
        "ScheduledDropout": "{'a.*': 0.1}, ",
        "WeightAveraging": "EMA(0.9), ",
        "WeightRegularization": "L2(0.1), ",
    },
}


def arguments_of(name: str) -> set[str]:
    """Return the names of the constructor arguments of a public class."""
    parameters = inspect.signature(getattr(lightning_optim, name)).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {parameter.name for parameter in parameters if parameter.kind not in variadic}


CLASSES = {name for name in lightning_optim.__all__ if inspect.isclass(getattr(lightning_optim, name))}
ON_OF_MODULES = {"Ensemble": {"on"}, "ActivationRegularization": {"on"}}  # modules, and no selection of parameters

# A policy of each public class, as the registry makes it. Its arguments need no row above, except for a sentence or a
# bound that shall not change.
PARTS = [part for entry in ALL_ENTRIES for part in parts_of(entry.all_callbacks(CELLS[0]))]
POLICIES = {type(part).__name__: part for part in PARTS if isinstance(part, Policy)}
POLICIES = {name: policy for name, policy in POLICIES.items() if name in CLASSES}
ARGUMENTS = [(name, argument) for name in sorted(POLICIES) for argument in sorted(arguments_of(name))]

WRONG += [
    (f"{name}({REQUIRED.get(name, '')}{argument}={value})", argument, value, allowed)
    for name in sorted(CLASSES - POLICIES.keys())
    for argument, (value, allowed) in OF_BASES.items()
    if argument in arguments_of(name) - ON_OF_MODULES.get(name, set())
]


def without_wrong_values(name: str) -> set[str]:
    """Return the names of the arguments that are true or false, so that no value is wrong."""
    parameters = inspect.signature(getattr(lightning_optim, name)).parameters.values()
    return {parameter.name for parameter in parameters if parameter.annotation in ("bool", "bool | None")}


# The package makes a step for each optimizer step, and a slot is the member of an enum.
NOT_MADE_BY_USERS = {"OptimizerStep", "Slot"}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case[0])
def test_wrong_argument(case: tuple[str, str, str, str]) -> None:
    made, argument, value, allowed = case
    with pytest.raises(ValueError) as caught:
        eval(made, NAMES)
    told = str(caught.value)
    assert f"`{argument}" in told
    assert re.search(rf"(got |got a |=){re.escape(value)}", told), "the value is not told"
    assert allowed in told


def test_each_argument_of_each_public_class_is_here() -> None:
    refused: dict[str, set[str]] = {name: set() for name in CLASSES}
    for made, argument, *_ in WRONG:
        refused[made.split("(")[0]].add(re.findall(r"\w+", argument.removeprefix("fraction in "))[0])
    for name in CLASSES - NOT_MADE_BY_USERS - POLICIES.keys():
        told = f"{name} has an argument without a wrong value in this file"
        assert refused[name] | without_wrong_values(name) == arguments_of(name), told


# ---- policies, from their entries ------------------------------------------------------------------------------------


def error(name: str, argument: str, value: Any) -> str:
    """Return the message if an argument of a policy has another value than in the registry; empty if there is no error.

    Of two arguments of which exactly one is given, the other one is left out.
    """
    signature = inspect.signature(kind := type(POLICIES[name]))
    parameters = {one: signature.parameters[one] for one in arguments_of(name)}
    given = {one: getattr(POLICIES[name], one) for one in parameters}
    needed = {one: held for one, held in given.items() if parameters[one].default is not None}
    told = []
    for arguments in (needed, given):
        try:
            kind(**(arguments | {argument: value}))
        except ValueError as caught:
            told.append(str(caught))
        else:
            return ""
    return next((one for one in told if one.startswith(f"`{argument}")), told[-1])


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_each_argument_of_a_policy_is_checked(name: str, argument: str) -> None:
    """NaN is a wrong value of every argument; a number is refused outside its range, and not at a bound within it."""
    told = error(name, argument, math.nan)
    assert f"`{argument}" in told
    assert "nan" in told, "the value is not told"
    integer = " must be an integer" in told
    if integer:
        assert error(name, argument, 1.5), "a fraction is allowed"
    for sign, bound in re.findall(r"([<>]=?) (-?[\d.]+),", told):
        assert_bound(name, argument, float(bound), below=sign[0] == "<", closed="=" in sign, integer=integer)
    for left, low, high, right in re.findall(r" in ([\[(])(-?[\d.]+), (-?[\d.]+)([\])]),", told):
        assert_bound(name, argument, float(low), below=False, closed=left == "[", integer=integer)
        assert_bound(name, argument, float(high), below=True, closed=right == "]", integer=integer)
    if "finite" in told:
        assert error(name, argument, math.inf)
        assert error(name, argument, -math.inf)


def assert_bound(name: str, argument: str, bound: float, *, below: bool, closed: bool, integer: bool) -> None:
    number: Any = int(bound) if integer else bound
    outside = number + (1 if below else -1) if integer else math.nextafter(number, math.inf if below else -math.inf)
    assert error(name, argument, outside).startswith(f"`{argument}`")
    assert bool(error(name, argument, number)) != closed


@pytest.mark.parametrize(("name", "argument"), [pair for pair in ARGUMENTS if pair[1] in OF_BASES])
def test_an_argument_of_a_base_class_is_passed_on(name: str, argument: str) -> None:
    value, allowed = OF_BASES[argument]
    assert allowed in error(name, argument, eval(value))
