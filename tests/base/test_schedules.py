"""Schedules: their formulas, where they begin and end, and what they refuse."""

from __future__ import annotations

import math

import jsonargparse
import pytest

from lightning_optim.base.arguments import check_number
from lightning_optim.base.schedules import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    Piecewise,
    Schedule,
    position,
    value_at,
)
from tests.harness.yaml_parsing import instantiate

RAMPS = [Linear, Cosine, Exponential]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(1.0, 0.0), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (Linear(0.0, 4.0, begin=0.5), [0.0, 0.0, 0.0, 2.0, 4.0]),
        (Linear(0.0, 4.0, until=0.5), [0.0, 2.0, 4.0, 4.0, 4.0]),
        (Linear(0.0, 4.0, begin=0.25, until=0.75), [0.0, 0.0, 2.0, 4.0, 4.0]),
        (Cosine(2.0, 0.0), [2.0, 1.0 + math.sqrt(0.5), 1.0, 1.0 - math.sqrt(0.5), 0.0]),
        (Exponential(1.0, 16.0), [1.0, 2.0, 4.0, 8.0, 16.0]),
        (Piecewise({0.0: 3.0, 0.25: 2.0, 1.0: 1.0}), [3.0, 2.0, 2.0, 2.0, 1.0]),
        (Constant(0.3), [0.3] * 5),
    ],
    ids=repr,
)
def test_values_at_five_steps(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule(step, 5) for step in range(5)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("total", [2, 3, 7, 1000])
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.3), (0.7, 1e-5)])
def test_first_and_last_step_have_exactly_start_and_end(ramp, start: float, end: float, total: int) -> None:
    schedule = ramp(start, end)
    assert schedule(0, total) == start
    assert schedule(total - 1, total) == end
    assert schedule(total + 10, total) == end


@pytest.mark.parametrize("ramp", RAMPS)
def test_moves_one_way_between_its_ends(ramp) -> None:
    values = [ramp(1.0, 0.1, begin=0.2, until=0.9)(step, 101) for step in range(101)]
    assert values == sorted(values, reverse=True)
    assert values[20] == 1.0 > values[21]
    assert values[89] > 0.1 == values[90]


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_run_of_one_step_is_at_its_start(ramp) -> None:
    assert ramp(0.5, 0.1)(0, 1) == 0.5


@pytest.mark.parametrize("ramp", RAMPS)
def test_bounds_are_those_of_the_values(ramp) -> None:
    schedule = ramp(0.2, 0.8)
    values = [schedule(step, 50) for step in range(50)]
    assert schedule.bounds == (0.2, 0.8) == (min(values), max(values))


def test_piecewise_keys_from_yaml_and_json() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=float | Schedule)
    name = "lightning_optim.base.schedules.Piecewise"
    for keys in ("{0: 1.0, 0.5: 0.1}", '{"0": 1.0, "0.5": 0.1}', "{0.5: 0.1, 0.0: 1}"):
        text = f"{{class_path: {name}, init_args: {{values: {keys}}}}}"
        schedule = instantiate(parser, parser.parse_args([f"--value={text}"])).value
        assert schedule.values == {0.0: 1.0, 0.5: 0.1}


def test_a_number_or_a_schedule_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=float | Schedule)
    assert parser.parse_args(["--value=1e-5"]).value == 1e-5
    text = "{class_path: lightning_optim.base.schedules.Linear, init_args: {start: 1e-3, end: 0}}"
    schedule = instantiate(parser, parser.parse_args([f"--value={text}"])).value
    assert isinstance(schedule, Linear)
    assert (schedule.start, schedule.end) == (1e-3, 0.0)


def test_value_at_resolves_both() -> None:
    assert value_at(0.25, step=3, total=math.inf) == 0.25
    assert value_at(Linear(0.0, 1.0), step=1, total=5) == 0.25


def test_only_a_constant_needs_no_total() -> None:
    assert Constant(1.0).constant and not Constant(1.0).scheduled
    assert Constant(2.0)(step=5) == 2.0
    for schedule in (Linear(1.0, 0.0), Piecewise({0: 1.0})):
        assert schedule.scheduled and not schedule.constant
        for total in (math.inf, math.nan, 0, -1):
            with pytest.raises(ValueError, match="`total` must be a finite number of optimizer steps >= 1"):
                schedule(0, total)


def test_position_stays_within_training() -> None:
    assert [position(step, 3) for step in range(5)] == [0.0, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Constant(math.nan), "`value` must be a number that is finite, got nan"),
        (lambda: Linear(True, 0.0), "`start` must be a number that is finite, got True"),
        (lambda: Linear(1.0, math.inf), "`end` must be a number that is finite, got inf"),
        (lambda: Linear(1.0, "0"), "`end` must be a number that is finite, got '0'"),
        (lambda: Cosine(1.0, 0.0, begin=1.0), r"`begin` must be a number in \[0.0, 1.0\), got 1.0"),
        (lambda: Cosine(1.0, 0.0, begin=0.5, until=0.5), r"`until` must be a number in \(0.5, 1.0\], got 0.5"),
        (lambda: Exponential(1.0, 0.0), "`end` must be a number > 0.0, got 0.0"),
        (lambda: Piecewise({}), "`values` must be a dictionary of fraction of training to value, got {}"),
        (lambda: Piecewise([1.0]), r"`values` must be a dictionary of fraction of training to value, got \[1.0\]"),
        (lambda: Piecewise({0.5: 1.0}), "`values` must have a value that holds from the fraction 0 on"),
        (lambda: Piecewise({0: 1.0, 10: 0.1}), r"`fraction in values` must be a number in \[0.0, 1.0\], got 10"),
        (lambda: Piecewise({0: 1.0, "half": 0.1}), r"must be a number in \[0.0, 1.0\], got 'half'"),
        (lambda: Piecewise({0: "x"}), r"`values\[0.0\]` must be a number that is finite, got 'x'"),
    ],
)
def test_refused_with_name_value_and_what_is_allowed(build, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


@pytest.mark.parametrize(
    ("value", "limits", "good"),
    [
        (0, {"low": 0}, True),
        (0, {"low": 0, "low_open": True}, False),
        (1.0, {"high": 1.0}, True),
        (1.0, {"high": 1.0, "high_open": True}, False),
        (math.inf, {"low": 0}, False),
        (math.inf, {"low": 0, "high": math.inf}, True),
        (-math.inf, {"high": 0}, False),
        (math.nan, {"low": -1, "high": 1}, False),
        (True, {"low": 0}, False),
        (2, {"integer": True}, True),
        (2.0, {"integer": True}, False),
        (None, {}, False),
        (Linear(1.0, 0.0), {"low": 0}, False),
        (Linear(1.0, 0.0), {"low": 0, "schedule": True}, True),
        (Linear(1.0, -0.1), {"low": 0, "schedule": True}, False),
        (Piecewise({0: 0.0, 0.5: 2.0}), {"high": 1, "schedule": True}, False),
    ],
)
def test_check_number(value: object, limits: dict, good: bool) -> None:
    if good:
        check_number("x", value, **limits)
    else:
        with pytest.raises(ValueError, match=r"`x` must be an? (number|integer)"):
            check_number("x", value, **limits)


def test_a_schedule_of_unknown_bounds_is_taken_on_trust() -> None:
    class Custom(Schedule):
        def __call__(self, step: int, total: float) -> float:
            return -1.0

    check_number("x", Custom(), low=0.0, schedule=True)
    assert Custom().bounds is None
