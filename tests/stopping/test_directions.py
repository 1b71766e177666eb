"""The direction in which each metric is better: stated by its criterion, told where something else contradicts it."""

from __future__ import annotations

import re
from typing import Any

import pytest

import lightning_optim
from lightning_optim import AllOf, AnyOf, Criterion, EarlyStopping, NonFinite, Plateau, Threshold
from lightning_optim.stopping.directions import directions
from tests.stopping.scripted_fits import Scripted, fit, same, weights

NAMES = dict(vars(lightning_optim))
SCORES = {"val_loss": [2.0, 1.0, 0.9, 0.8, 1.5], "val_acc": [0.4, 0.6, 0.9, 0.9, 0.7]}


def both() -> Criterion:
    return AllOf([Plateau("val_loss"), Plateau("val_acc", mode="max")])


@pytest.mark.parametrize(
    ("best_by", "mode", "best"),
    [
        (["val_acc", "val_loss"], "min", 3),
        (["val_acc", "val_loss"], ["max", "min"], 3),
        (["val_loss", "val_acc"], "min", 3),
        ("val_acc", "min", 2),
        ("val_acc", "max", 2),
        ("val_loss", "min", 3),
        ({"val_loss": 1.0, "val_acc": -1.0}, "min", 3),
        ({"val_loss": -1.0, "val_acc": 9.0}, "max", 3),
    ],
)
def test_the_weights_that_the_criteria_call_best_are_restored(best_by: Any, mode: Any, best: int) -> None:
    module, stop = Scripted(SCORES), EarlyStopping(both(), best_by=best_by, mode=mode)
    fit(module, stop)
    assert stop.best_check == best
    assert same(weights(module), module.seen[best])


def test_a_metric_without_a_criterion_has_the_mode_that_is_passed() -> None:
    for mode, best in (("min", 0), ("max", 2)):
        stop = EarlyStopping(Plateau("val_loss"), best_by="val_acc", mode=mode)
        fit(Scripted(SCORES), stop)
        assert stop.best_check == best


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            "EarlyStopping({both}, best_by=['val_loss', 'val_acc'], mode='max')",
            "`mode='max'` contradicts the criteria, which say that 'val_loss' is best at its minimum: leave out `mode`",
        ),
        (
            "EarlyStopping({both}, best_by=['val_loss', 'val_acc'], mode=['min', 'min'])",
            "contradicts the criteria, which say that 'val_acc' is best at its maximum",
        ),
        ("EarlyStopping({both}, best_by='val_loss', mode='max')", "`mode='max'` contradicts the criteria"),
        (
            "EarlyStopping({both}, best_by={{'val_acc': 1.0, 'val_loss': 1.0}})",
            "'val_acc' is best at its maximum: write best_by={'val_acc': -1.0, 'val_loss': 1.0}",
        ),
        (
            "EarlyStopping({both}, best_by={{'val_acc': 1.0, 'val_loss': 1.0}}, mode='max')",
            "'val_loss' is best at its minimum: write best_by={'val_acc': 1.0, 'val_loss': -1.0}",
        ),
        (
            "EarlyStopping({both}, best_by={{'val_acc': 1.0, 'val_loss': -1.0}})",
            "'val_acc' is best at its maximum and 'val_loss' is best at its minimum: write mode='max'",
        ),
        ("EarlyStopping(Plateau('val_acc'), mode='max')", "`mode='max'` belongs to the criterion: pass it to Plateau"),
    ],
)
def test_a_contradiction_is_told(wrong: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        eval(wrong.format(both=repr(both())), NAMES)


def test_what_the_criteria_leave_open() -> None:
    either = AnyOf([NonFinite("norm"), Threshold("a", 1.0), Plateau("a", mode="max"), AllOf([Plateau("b")])])
    assert directions(either) == {"b": "min"}
    assert EarlyStopping(either, best_by="a", mode="max").mode == "max"


def test_another_mode_or_criterion_later() -> None:
    stop = EarlyStopping(both(), best_by=["val_acc", "other"])
    assert stop._best_by is not None
    assert stop._best_by.mode == ["max", "min"]
    stop.mode = "max"
    assert stop._best_by.mode == ["max", "max"]
    with pytest.raises(ValueError, match="contradicts"):
        stop.best_by = "val_loss"
    stop.monitor = AllOf([Plateau("val_loss"), Plateau("other", mode="max")])
    assert stop._best_by.mode == ["max", "max"]
    with pytest.raises(ValueError, match="contradicts"):
        stop.monitor = AllOf([Plateau("val_loss"), Plateau("other")])
    assert stop.criterion.monitors == ("val_loss", "other"), "an error changes nothing"


def test_the_best_of_a_checkpoint_goes_on(tmp_path: Any) -> None:
    first = EarlyStopping(both(), best_by=["val_acc", "val_loss"])
    path = tmp_path / "last.ckpt"
    fit(Scripted(SCORES), first, max_epochs=3).save_checkpoint(path)
    second, module = EarlyStopping(both(), best_by=["val_acc", "val_loss"]), Scripted(SCORES)
    fit(module, second, ckpt_path=path)
    assert second.best_check == 3
