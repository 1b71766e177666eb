"""An argument in the place of another one, and several metrics, are answered with the line to write, which works."""

from __future__ import annotations

import re

import pytest

import lightning_optim
from lightning_optim import EarlyStopping

NAMES = dict(vars(lightning_optim))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("EarlyStopping(['a', 'b'])", "EarlyStopping(AllOf([Plateau('a'), Plateau('b')]), best_by='a')"),
        ("EarlyStopping(('a', 'b'))", "EarlyStopping(AllOf([Plateau('a'), Plateau('b')]), best_by='a')"),
        (
            "EarlyStopping({'a': 'max', 'b': 'min'}, patience=7)",
            "EarlyStopping(AllOf([Plateau('a', patience=7, mode='max'), Plateau('b', patience=7)]), best_by='a')",
        ),
        (
            "EarlyStopping(['a', 'b'], mode='max')",
            "EarlyStopping(AllOf([Plateau('a', mode='max'), Plateau('b', mode='max')]), best_by='a')",
        ),
        (
            "EarlyStopping([Plateau('a'), Plateau('a', patience=9)])",
            "EarlyStopping(AllOf([Plateau('a'), Plateau('a', patience=9)]))",
        ),
        (
            "EarlyStopping(['val_loss', 'val_acc'])",
            "EarlyStopping(AllOf([Plateau('val_loss'), Plateau('val_acc', mode='max')]), best_by='val_loss')",
        ),
        ("EarlyStopping(['f1'], patience=7)", "EarlyStopping('f1', mode='max')"),
        ("Plateau(['loss', 'acc'])", "AllOf([Plateau('loss'), Plateau('acc', mode='max')])"),
        ("AllOf('loss', 'acc')", "AllOf([Plateau('loss'), Plateau('acc', mode='max')])"),
        ("EarlyStopping(['a'])", "EarlyStopping('a')"),
        ("EarlyStopping({'a': 1.0})", "EarlyStopping('a')"),
        ("EarlyStopping(5, 'a')", "EarlyStopping('a', patience=5)"),
        ("EarlyStopping(0.01, 'a')", "EarlyStopping('a', min_delta=0.01)"),
        ("EarlyStopping('max', 'a')", "EarlyStopping('a', mode='max')"),
        ("Plateau(3, 'a')", "Plateau('a', patience=3)"),
        ("Plateau('min', 'a')", "Plateau('a', mode='min')"),
        ("Plateau(['a', 'b'])", "AllOf([Plateau('a'), Plateau('b')])"),
        ("Threshold(0.9, 'acc')", "Threshold('acc', value=0.9)"),
        ("Divergence(9.0, 'a')", "Divergence('a', value=9.0)"),
    ],
)
def test_the_line_to_write_is_told(wrong: str, line: str) -> None:
    with pytest.raises(ValueError) as caught:
        eval(wrong, NAMES)
    assert line in str(caught.value)
    eval(line, NAMES)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("EarlyStopping('a', 'max')", "`min_delta` must be a number, got 'max': write `mode='max'`"),
        ("Plateau('a', 'max')", "`patience` must be a number, got 'max': write `mode='max'`"),
        ("Threshold('a', 'max')", "`value` must be a number, got 'max': write `mode='max'`"),
        ("Threshold('max', 'a')", "which comes first, got 'max': write Threshold('a', value=…, mode='max')"),
        ("EarlyStopping(Plateau)", "; Plateau is a class, so write Plateau(…)"),
        ("EarlyStopping([3, 4])", "`monitor` must be one metric's name or a criterion, got [3, 4]"),
        ("EarlyStopping([L2(0.1), 'a'])", "; L2(0.1) belongs in WeightRegularization(L2(0.1))"),
        ("EarlyStopping([])", "`monitor` must be a metric's name, got []"),
        ("AllOf(EMA(0.9))", "; EMA(decay=0.9) belongs in WeightAveraging(EMA(0.9))"),
        ("EarlyStopping('a', patience=float('nan'))", "`patience` must be an integer >= 0, got nan; `math.inf` never"),
        ("EarlyStopping('a', patience=-float('inf'))", "`patience` must be an integer >= 0, got -inf"),
        ("Plateau('a', patience='5')", "`patience` must be an integer >= 0, got '5'"),
    ],
)
def test_what_is_wrong_is_told(wrong: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        eval(wrong, NAMES)


def test_an_assigned_list_of_metrics_is_refused() -> None:
    stop = EarlyStopping("a")
    with pytest.raises(ValueError, match=r"EarlyStopping\(AllOf"):
        stop.monitor = ["a", "b"]  # type: ignore[assignment]
    assert stop.monitor == "a"


def test_a_metric_may_be_called_max() -> None:
    assert EarlyStopping("max").monitor == "max"
