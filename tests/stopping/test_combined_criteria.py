"""Test combined criteria on scripted scores."""

from __future__ import annotations

from typing import Any

import pytest

import lightning_optim
from lightning_optim import AllOf, AnyOf, AtLeast, EarlyStopping, NonFinite, Plateau, Threshold
from lightning_optim.stopping.criteria import Criterion

A = (5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0)
B = (1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0)


NAMES = dict(vars(lightning_optim))


def stops_at(criterion: Criterion) -> int | None:
    checks = ({"a": a, "b": b} for a, b in zip(A, B, strict=True))
    return next((index for index, metrics in enumerate(checks) if criterion.update(metrics)), None)


def criteria() -> list[Criterion]:
    return [Plateau("a", patience=2), Plateau("b", patience=2, mode="max"), Threshold("a", 3.5)]


# `a` has not improved for two validations at index 3, and from 6 on; `b` from 6 on; the threshold is passed from 4 on.
@pytest.mark.parametrize(
    ("criterion", "index"),
    [
        (AnyOf(criteria()), 3),
        (AtLeast(1, criteria()), 3),
        (AtLeast(2, criteria()), 6),
        (AllOf(criteria()), 6),
        (AllOf([Plateau("a", patience=2), Plateau("b", patience=9, mode="max")]), None),
    ],
)
def test_index_of_the_stop(criterion: Criterion, index: int | None) -> None:
    assert stops_at(criterion) == index


def test_all_are_asked_at_every_check_and_all_reasons_are_given() -> None:
    both = AllOf([Threshold("a", 3.5), Plateau("b", patience=2, mode="max")])
    assert stops_at(both) == 6
    assert "'a' = 3.0 < 3.5" in both.reason and "'b' did not improve" in both.reason


def test_improved_if_any_is() -> None:
    both = AllOf([Plateau("a"), Plateau("b", mode="max")])
    improved = []
    for a, b in zip(A, B, strict=True):
        both.update({"a": a, "b": b})
        improved.append(both.improved)
    assert improved == [True] * 5 + [False] * 3


def test_state_goes_on_where_it_was() -> None:
    whole, first = AtLeast(2, criteria()), AtLeast(2, criteria())
    metrics = [{"a": a, "b": b} for a, b in zip(A, B, strict=True)]
    expected = [whole.update(values) for values in metrics]
    got = [first.update(values) for values in metrics[:5]]
    second = AtLeast(2, criteria())
    second.load_state_dict(first.state_dict())
    assert got + [second.update(values) for values in metrics[5:]] == expected
    second.reset()
    assert [second.update(values) for values in metrics] == expected


def test_states_are_found_by_what_the_criteria_are() -> None:
    """Whatever else is in the list on resume; of two alike the first has the first state."""
    first = AnyOf([Plateau("a", patience=1), Threshold("a", 1.0), Plateau("a", patience=9)])
    for value in (5.0, 6.0, 3.0, 7.0):
        first.update({"a": value})
    assert [criterion.wait for criterion in (first.criteria[0], first.criteria[2])] == [1, 0]
    second = AnyOf([Plateau("b"), Plateau("a", patience=2), Plateau("a", patience=3), Threshold("c", 1.0)])
    second.load_state_dict(first.state_dict())
    assert [(one.best, one.wait) for one in second.criteria[:3]] == [(float("inf"), 0), (3.0, 1), (3.0, 0)]
    assert second.criteria[3].best == float("inf")


def test_identity_is_that_of_the_criteria() -> None:
    one, other = AllOf([Plateau("a"), Plateau("b")]), AllOf([Plateau("a"), Plateau("c")])
    assert one.identity == AllOf([Plateau("a", patience=9), Plateau("b")]).identity != other.identity


def test_one_criterion_is_enough() -> None:
    for make in (AnyOf, AllOf):
        assert make([Threshold("a", 2.0)]).update({"a": 1.0})
    assert AnyOf([Plateau("a")]).k == 1


def test_only_those_that_say_so_give_a_reason() -> None:
    two = AtLeast(1, [Threshold("a", 0.0), Threshold("a", 2.0), Plateau("a")])
    assert two.update({"a": 1.0})
    assert two.reason == "Stopping threshold reached: 'a' = 1.0 < 2.0."


@pytest.mark.parametrize("k", [0, 4, 1.5, True])
def test_wrong_k(k: int) -> None:
    with pytest.raises(ValueError, match="`k"):
        AtLeast(k, criteria())


@pytest.mark.parametrize("written", ["AllOf({})", "AnyOf({})", "AtLeast(2, {})"])
def test_criteria_one_after_another_are_a_list(written: str) -> None:
    one_by_one = eval(written.format("Plateau('a'), Threshold('b', 0.5)"), NAMES)
    as_list = eval(written.format("[Plateau('a'), Threshold('b', 0.5)]"), NAMES)
    assert repr(one_by_one) == repr(as_list) and one_by_one.identity == as_list.identity
    assert repr(eval(repr(one_by_one), NAMES)) == repr(one_by_one)
    assert one_by_one.monitors == ("a", "b")
    scores = [{"a": a, "b": b} for a, b in ((1.0, 1.0), (2.0, 0.4), (2.0, 0.6), (2.0, 0.4))]
    assert [one_by_one.update(metrics) for metrics in scores] == [as_list.update(metrics) for metrics in scores]


def test_one_criterion_needs_no_list() -> None:
    assert repr(AllOf(Plateau("a"))) == repr(AllOf([Plateau("a")]))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("AtLeast([Plateau('a'), Plateau('b')], 2)", "AtLeast(2, [Plateau('a'), Plateau('b')])"),
        ("AtLeast(Plateau('a'), Plateau('b'))", "AtLeast(1, [Plateau('a'), Plateau('b')])"),
        ("AtLeast(1, 'val_loss')", "AtLeast(1, [Plateau('val_loss')])"),
        ("AllOf('val_loss')", "AllOf([Plateau('val_loss')])"),
        ("AnyOf('a', 'b')", "AnyOf([Plateau('a'), Plateau('b')])"),
        ("AllOf([Plateau('a')], Plateau('b'))", "AllOf([Plateau('a'), Plateau('b')])"),
        ("AllOf(3)", "AllOf([Plateau('val_loss')])"),
        ("AnyOf(Plateau('a'), 3)", "AnyOf([Plateau('a')])"),
    ],
)
def test_the_line_to_write_is_told(wrong: str, line: str) -> None:
    with pytest.raises(ValueError) as caught:
        eval(wrong, NAMES)
    assert line in str(caught.value)
    eval(line, NAMES)  # and it works


@pytest.mark.parametrize("wrong", [[], None, ["val_loss"], 3, "a"])
def test_wrong_criteria(wrong: list[Criterion]) -> None:
    for make in (AnyOf, AllOf):
        with pytest.raises(ValueError, match="criteria"):
            make(wrong)


def test_several_monitors_need_to_know_what_is_best() -> None:
    two = [Plateau("a"), Plateau("b", mode="max")]
    with pytest.raises(ValueError, match="best_by"):
        EarlyStopping(AllOf(two))
    assert EarlyStopping(AllOf(two), restore_best=False).criterion.monitors == ("a", "b")
    assert EarlyStopping(AllOf(two), best_by=["a", "b"]).best_by == ["a", "b"]


def without_identities(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state as the first version wrote it: a list in the order of the criteria, also of nested ones."""
    return {"criteria": [without_identities(s) if "criteria" in s else s for _, s in state["criteria"]]}


def test_a_checkpoint_of_the_first_version_is_taken_over() -> None:
    def nested() -> AllOf:
        return AllOf([AnyOf([NonFinite("a"), Threshold("b", 2.0), Plateau("a", patience=2)]), Plateau("b", mode="max")])

    old, new = nested(), nested()
    old.update({"a": 3.0, "b": 1.0})
    old.update({"a": 4.0, "b": 3.0})
    load(new, old)
    assert new.state_dict() == old.state_dict()
    two, other = AnyOf([Plateau("a")]), AnyOf([Plateau("a"), Threshold("a", 1.0)])
    with pytest.raises(ValueError, match=r"earlier version.*same criteria"):
        load(other, two)
    with pytest.raises(ValueError, match=r"earlier version.*same criteria"):
        load(AnyOf([NonFinite("a")]), two)


def load(new: Criterion, old: Criterion) -> None:
    """Load a checkpoint of the first version, as a callback does."""
    one, other = (EarlyStopping(criterion, restore_best=False) for criterion in (old, new))
    state = one.state_dict()
    del state["state_version"]
    other.load_state_dict({**state, "criterion": without_identities(state["criterion"])})


def test_what_improved_is_told_of_each_metric_that_did() -> None:
    any_of = AnyOf([Plateau("a", patience=1), Plateau("b", mode="max")])
    both, said = AllOf([any_of, Threshold("b", 9.0, mode="max")]), []
    for a, b in ((2.0, 1.0), (2.5, 2.0), (1.5, 1.5)):
        both.update({"a": a, "b": b})
        said.append(both.improvement)
    assert said == [
        "Metric a improved. New best score: 2.000. Metric b improved. New best score: 1.000.",
        "",  # the first criterion stops, and the one behind it is not asked
        "Metric a improved by 0.500 >= min_delta = 0.0. New best score: 1.500."
        " Metric b improved by 0.500 >= min_delta = 0.0. New best score: 1.500.",
    ]
