"""The direction in which each metric is better: stated by its criterion, told where something else contradicts it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import lightning_optim
from lightning_optim import AllOf, AnyOf, Criterion, EarlyStopping, NonFinite, Plateau, Threshold
from lightning_optim.stopping.directions import directions
from tests.lightning import Tuner
from tests.lightning import callbacks as theirs
from tests.stopping.scripted_fits import Scripted, data, fit, same, trainer, weights

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
        stop = EarlyStopping(Plateau("val_loss"), best_by="other", mode=mode)
        fit(Scripted(SCORES | {"other": SCORES["val_acc"]}), stop)
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


LIKELY = [
    'EarlyStopping("val_loss")',
    'EarlyStopping("val_acc", mode="max")',
    'EarlyStopping("neg_loss", mode="max")',
    'EarlyStopping("macro")',
    'EarlyStopping(Plateau("val_loss"), best_by="val_acc", mode="max")',
    'EarlyStopping("val_loss", best_by={"val_loss": 1.0, "val_acc": -0.5})',
    'EarlyStopping(AllOf([NonFinite("val_acc"), Plateau("val_acc", mode="max")]))',
]
UNLIKELY = {
    'EarlyStopping("val_acc")': "EarlyStopping takes the smallest value of 'val_acc' as the best, but its name says"
    " that larger is better: write EarlyStopping('val_acc', mode='max').",
    'EarlyStopping("val_loss", mode="max")': "EarlyStopping takes the largest value of 'val_loss' as the best, but its"
    " name says that smaller is better: write EarlyStopping('val_loss', mode='min').",
    'EarlyStopping(AnyOf([NonFinite("val_acc"), Plateau("val_acc")]))': "pass `mode='max'` to Plateau('val_acc').",
    'EarlyStopping("val_loss", best_by="val_acc")': "write EarlyStopping(Plateau('val_loss'), best_by='val_acc',"
    " mode='max').",
    'EarlyStopping("val_loss", best_by=["val_acc", "other"])': "best_by=['val_acc', 'other'], mode=['max', 'min']).",
    'EarlyStopping("val_loss", best_by={"val_loss": 1.0, "val_acc": 0.5})': "change the sign of its weight in `best",
}


@pytest.mark.parametrize("line", [*LIKELY, *UNLIKELY])
def test_a_direction_that_the_name_contradicts_is_told_once(line: str) -> None:
    scores = SCORES | {name: SCORES["val_acc"] for name in ("neg_loss", "macro", "other")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        fit(Scripted(scores), eval(line, NAMES))
    said = [str(one.message) for one in caught if str(one.message).startswith("EarlyStopping takes")]
    assert [UNLIKELY[line] in one for one in said] == ([True] if line in UNLIKELY else [])


class Tunable(Scripted):
    """A module for the Tuner, which changes ``lr``."""

    def __init__(self) -> None:
        super().__init__({name: values * 3 for name, values in SCORES.items()})
        self.lr = 0.05


@pytest.mark.parametrize("trial", [False, True])
def test_trials_are_silent(trial: bool, tmp_path: Path) -> None:
    module = Tunable()
    beside = theirs.EarlyStopping("val_acc", mode="max")
    before = 0
    running = trainer(EarlyStopping("val_acc"), beside, fast_dev_run=trial, default_root_dir=tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if not trial:
            Tuner(running).lr_find(module, data(), data(seed=1), num_training=5)
        before = len([one for one in caught if "EarlyStopping" in str(one.message)])
        running.fit(module, data(), data(seed=1))
    said = [str(one.message) for one in caught if "EarlyStopping" in str(one.message)]
    assert (before, len(said)) == (0, 0 if trial else 2), said
