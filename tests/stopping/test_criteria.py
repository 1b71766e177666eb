"""Criteria: scripted lists of scores, and Lightning's own EarlyStopping as the oracle."""

from __future__ import annotations

import math
import pickle

import jsonargparse
import pytest
import torch

from lightning_optim.stopping.combined_criteria import AnyOf
from lightning_optim.stopping.criteria import Criterion, Divergence, NonFinite, Plateau, Threshold
from lightning_optim.stopping.improvement import Best, read
from tests.harness.yaml_parsing import instantiate
from tests.lightning import callbacks as theirs

NAN, INF = math.nan, math.inf
SCRIPTS = [
    [1.0, 0.9, 0.8, 0.7, 0.6],
    [1.0, 0.9, 0.9, 0.9, 0.9, 0.8],
    [1.0, 0.91, 0.82, 0.73, 0.64, 0.55, 0.46],
    [1.0, 0.9, 0.8, 0.7000001, 0.7, 0.6],
    [0.3, 0.1, 0.2, 0.1, 0.1 + 1e-9, 0.0, -0.1],
    [NAN, NAN, 0.5, 0.4, NAN, 0.4, 0.3],
    [0.5, NAN, NAN, NAN, NAN],
    [INF, 3.0, -INF, -INF, 1.0],
    [2.0, 5.0, 12.0, -7.0, 1.0, 1.0, 1.0],
]


def _feed(criterion: Criterion, scores: list[float], name: str = "x") -> list[bool]:
    return [criterion.update({name: score}) for score in scores]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("min_delta", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("scores", SCRIPTS, ids=str)
def test_plateau_is_lightnings_rule(scores: list[float], patience: int, min_delta: float, mode: str) -> None:
    oracle = theirs.EarlyStopping("x", min_delta=min_delta, patience=patience, mode=mode, check_finite=False)
    ours = Plateau("x", patience=patience, mode=mode, min_delta=min_delta)
    for score in torch.tensor(scores):
        before = oracle.best_score
        stop, _ = oracle._evaluate_stopping_criteria(score)
        assert ours.update({"x": score}) == stop
        assert ours.best == oracle.best_score.item()
        assert ours.wait == oracle.wait_count
        assert ours.improved == bool(oracle.best_score != before)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold", [0.75, -2.0])
@pytest.mark.parametrize("scores", SCRIPTS, ids=str)
def test_any_of_is_lightnings_order(scores: list[float], threshold: float, mode: str) -> None:
    hopeless = 4.0 if mode == "min" else -4.0
    oracle = theirs.EarlyStopping(
        "x", patience=2, mode=mode, stopping_threshold=threshold, divergence_threshold=hopeless, min_delta=0.05
    )
    plateau = Plateau("x", patience=2, mode=mode, min_delta=0.05)
    ours = AnyOf([NonFinite("x"), Threshold("x", threshold, mode), Divergence("x", hopeless, mode), plateau])
    starts = {
        "NON_FINITE_METRIC": "Monitored metric 'x' =",
        "STOPPING_THRESHOLD": "Stopping threshold reached: 'x' =",
        "DIVERGENCE_THRESHOLD": "Divergence threshold reached: 'x' =",
        "PATIENCE_EXHAUSTED": "Monitored metric 'x' did not improve in the last",
    }
    for score in torch.tensor(scores):
        stop, _ = oracle._evaluate_stopping_criteria(score)
        assert ours.update({"x": score}) == stop
        assert (plateau.best, plateau.wait) == (oracle.best_score.item(), oracle.wait_count)
        assert ours.reason.startswith(starts[oracle.stopping_reason.name]) if stop else ours.reason == ""


def test_an_improvement_of_exactly_min_delta_is_none() -> None:
    plateau = Plateau("x", patience=2, min_delta=0.25)
    assert _feed(plateau, [1.0, 0.75, 0.75]) == [False, False, True]
    assert plateau.best == 1.0


def test_a_slow_drift_counts_as_soon_as_it_adds_up() -> None:
    plateau = Plateau("x", patience=2, min_delta=0.1)
    assert not any(_feed(plateau, [1.0 - 0.09 * k for k in range(9)]))
    assert plateau.best == pytest.approx(0.28)


def test_a_first_nan_does_not_poison() -> None:
    plateau = Plateau("x", patience=2)
    assert _feed(plateau, [NAN, 1.0, NAN, NAN]) == [False, False, False, True]
    assert plateau.best == 1.0


def test_improved_is_that_of_the_last_check() -> None:
    plateau = Plateau("x", mode="max")
    improved = []
    for score in (1.0, 0.5, 2.0, 2.0, NAN):
        plateau.update({"x": score})
        improved.append(plateau.improved)
    assert improved == [True, False, True, False, False]


def test_the_reason_is_a_sentence_and_goes_away() -> None:
    plateau = Plateau("x", patience=1)
    _feed(plateau, [1.0, 2.0])
    assert plateau.reason == "Monitored metric 'x' did not improve in the last check. Best score: 1.000."
    plateau.update({"x": 0.5})
    assert plateau.reason == ""


def test_threshold_is_strict_and_its_stop_is_the_best_check() -> None:
    threshold = Threshold("x", 0.5)
    assert _feed(threshold, [0.6, 0.5, NAN, 0.4]) == [False, False, False, True]
    assert threshold.improved
    assert threshold.reason == "Stopping threshold reached: 'x' = 0.4 < 0.5."
    assert threshold.update({"x": 0.45})  # a run that must go on for `min_epochs`
    assert not threshold.improved
    assert threshold.update({"x": 0.3})
    assert threshold.improved


def test_divergence_is_strict() -> None:
    divergence = Divergence("x", 2.0)
    assert _feed(divergence, [1.0, 2.0, NAN, 3.0]) == [False, False, False, True]
    assert divergence.reason == "Divergence threshold reached: 'x' = 3.0 > 2.0."
    assert _feed(Divergence("x", 0.1, mode="max"), [0.5, 0.1, 0.05]) == [False, False, True]


@pytest.mark.parametrize(
    ("kind", "scores", "wanted"),
    [
        (Plateau, [1.0, 0.9, 0.8, 0.4], [False, False, True, False]),
        (Threshold, [1.0, 0.9, 0.4, 0.6], [False, False, True, False]),
        (Divergence, [1.0, 1.4, 1.6, 1.2], [False, False, True, False]),
    ],
)
def test_a_subclass_overrides_what_is_better(kind: type, scores: list[float], wanted: list[bool]) -> None:
    """Each criterion that compares asks `better`; here a value must be a half below the other to be better."""

    class Half(kind):  # type: ignore[misc]
        def better(self, value: torch.Tensor, than: float) -> bool:
            return bool(value < than - 0.5)

    criterion = Half("x", 2 if kind is Plateau else 1.0)
    assert _feed(criterion, scores) == wanted


def test_non_finite() -> None:
    assert _feed(NonFinite("x"), [1.0, INF, -INF, NAN, 0.0]) == [False, True, True, True, False]


def test_any_of_does_not_ask_those_behind_the_one_that_stops() -> None:
    first, last = Plateau("x", patience=1), Plateau("y", patience=5)
    both = AnyOf([first, last])
    assert not both.update({"x": 1.0, "y": 1.0})
    assert both.improved
    assert both.update({"x": 2.0, "y": 0.5})
    assert not both.improved
    assert last.best == 1.0
    assert both.reason == first.reason != ""
    assert both.monitors == ("x", "y")


def test_any_of_improves_if_one_does() -> None:
    both = AnyOf([Plateau("x"), Plateau("y")])
    both.update({"x": 1.0, "y": 1.0})
    both.update({"x": 2.0, "y": 0.5})
    assert both.improved


def test_on_resume_the_arguments_given_now_win() -> None:
    short = Plateau("x", patience=2)
    _feed(short, [1.0, 2.0])
    long = Plateau("x", patience=4, min_delta=0.5)
    long.load_state_dict(short.state_dict())
    assert (long.patience, long.min_delta, long.best, long.wait) == (4, 0.5, 1.0, 1)
    assert _feed(long, [0.6, 0.6, 0.6]) == [False, False, True]


@pytest.mark.parametrize("criterion", [Plateau("x"), Threshold("x", 5.0), AnyOf([Threshold("x", 5.0), Plateau("x")])])
def test_reset_forgets_everything(criterion: Criterion) -> None:
    fresh = criterion.state_dict()
    _feed(criterion, [1.0, 2.0])
    assert criterion.state_dict() != fresh
    criterion.improved, criterion.reason = True, "It was so."
    criterion.reset()
    assert criterion.state_dict() == fresh
    assert not criterion.improved
    assert criterion.reason == ""


@pytest.mark.parametrize(
    "criterion", [Plateau("z"), Threshold("z", 1.0), Divergence("z", 1.0), NonFinite("z"), Best("z")]
)
def test_a_missing_metric_is_named_with_those_that_exist(criterion) -> None:
    act = criterion.better if isinstance(criterion, Best) else criterion.update
    with pytest.raises(KeyError, match=r"'z' was not logged\. Logged metrics: 'a', 'b'"):
        act({"b": 1.0, "a": 2.0})


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1, torch.float64), (1.5, torch.float64), (torch.tensor([[1.5]]), torch.float32), (torch.tensor(2), torch.int64)],
)
def test_metrics_are_numbers_or_tensors_of_one_element(value, dtype: torch.dtype) -> None:
    got = read({"x": value}, "x")
    assert (got.dtype, got.ndim, float(got)) == (dtype, 0, float(value))
    assert not Plateau("x").update({"x": value})


@pytest.mark.parametrize(
    ("best", "checks", "wanted"),
    [
        (Best("x"), [{"x": v} for v in (2.0, 2.0, 1.0, NAN, 1.5)], [True, False, True, False, False]),
        (Best("x", mode="max"), [{"x": v} for v in (NAN, 1.0, 2.0, 2.0)], [False, True, True, False]),
        (
            Best({"x": 2.0, "y": -1.0}),
            [{"x": 1.0, "y": 0.0}, {"x": 1.5, "y": 1.5}, {"x": 1.0, "y": 0.0}, {"x": 0.0, "y": NAN}],
            [True, True, False, False],
        ),
        (
            Best(["x", "y"], mode="max"),
            [
                {"x": 1.0, "y": 1.0},
                {"x": 1.0, "y": 2.0},
                {"x": 0.5, "y": 9.0},
                {"x": 2.0, "y": 0.0},
                {"x": 3.0, "y": NAN},
            ],
            [True, True, False, True, False],
        ),
        (
            Best(["x", "y"], mode=["max", "min"]),
            [{"x": 1.0, "y": 1.0}, {"x": 1.0, "y": 2.0}, {"x": 1.0, "y": 0.5}],
            [True, False, True],
        ),
    ],
    ids=repr,
)
def test_best(best: Best, checks: list[dict[str, float]], wanted: list[bool]) -> None:
    best.reset()
    assert [best.better(check) for check in checks] == wanted
    resumed = Best(best.by, best.mode)
    resumed.load_state_dict(pickle.loads(pickle.dumps(best.state_dict())))
    assert resumed.best == best.best
    assert not resumed.better(checks[wanted.index(True)])
    best.reset()
    assert best.better(checks[wanted.index(True)])


def test_best_reads_these_metrics() -> None:
    assert Best("x").monitors == ("x",)
    assert Best({"x": 1.0, "y": 2.0}).monitors == ("x", "y")
    assert Best(["y", "x"]).monitors == ("y", "x")


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Plateau("x", patience=-1), "`patience` must be an integer >= 0, got -1"),
        (lambda: Plateau("x", patience=2.5), "`patience` must be an integer >= 0, got 2.5"),
        (lambda: Plateau("x", min_delta=-0.1), "`min_delta` must be a number >= 0.0, got -0.1"),
        (lambda: NonFinite(3), "`monitor` must be a metric's name, got 3"),
        (lambda: Plateau("x", mode="auto"), "`mode` must be one of 'min', 'max', got 'auto'"),
        (lambda: Threshold("x", "0.5"), "`value` must be a number that is finite, got '0.5'"),
        (lambda: Divergence("x", NAN), "`value` must be a number that is finite, got nan"),
        (lambda: AnyOf([]), r"`criteria` must be one criterion or more, written as AnyOf\(\[Plateau.*\), got \[\]"),
        (
            lambda: AnyOf(["x"]),
            r"`criteria` must be .* written as AnyOf\(\[Plateau\('x'\)\]\), got \['x'\]",
        ),
        (lambda: Best([]), r"`best_by` must be a metric's name.*, got \[\]"),
        (lambda: Best({"x": True}), r"`best_by\['x'\]` must be a number that is finite, got True"),
        (lambda: Best(["x", "y"], mode=["min"]), r"`mode` must be one mode, or one for each name"),
        (lambda: Best("x", mode="least"), "`mode` must be one of 'min', 'max', got 'least'"),
    ],
)
def test_refused(build, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


def test_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--monitor", type=str | Criterion)
    room = "lightning_optim.stopping.criteria"
    both = [
        f"{{class_path: {room}.NonFinite, init_args: {{monitor: x}}}}",
        f"{{class_path: {room}.Plateau, init_args: {{monitor: x, patience: 7}}}}",
    ]
    text = f"{{class_path: lightning_optim.AnyOf, init_args: {{criteria: [{', '.join(both)}]}}}}"
    criterion = instantiate(parser, parser.parse_args([f"--monitor={text}"])).monitor
    assert [type(one) for one in criterion.criteria] == [NonFinite, Plateau]
    assert criterion.criteria[1].patience == 7
