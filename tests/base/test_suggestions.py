"""A name that does not exist is answered with one that is near, and with nothing if none is."""

from __future__ import annotations

import pytest

from lightning_optim.base.suggestions import nearest, nearest_pattern, shown

METRICS = ["epoch", "train_loss", "train_loss_step", "val_accuracy", "val_loss"]
PARAMETERS = ["encoder.0.weight", "encoder.0.bias", "encoder.norm.weight", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("val_los", "val_loss"),
        ("Val/Loss", "val_loss"),
        ("loss", "val_loss"),
        ("accuracy", "val_accuracy"),
        ("loss_val", "val_loss"),
        ("train_los", "train_loss"),
    ],
)
def test_near_names(name: str, near: str) -> None:
    assert nearest(name, METRICS) == f"; did you mean {near!r}?"


@pytest.mark.parametrize("name", ["x", "f1", "test_perplexity", "", "/", "val_f1"])
def test_a_far_name_is_not_suggested(name: str) -> None:
    assert nearest(name, METRICS) == ""
    assert nearest(name, []) == ""


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("encodr.*", "encoder.*"),
        ("*.weigth", "*.weight"),
        ("*.norms.*", "*.norm.*"),
        ("heads.*", "head.*"),
        ("encoder", "encoder.*"),
        ("encoder.0", "encoder.0.*"),
        ("head.wieght", "head.weight"),
        ("head.*.weight", "head.weight"),
        ("*.Bias", "*.bias"),
    ],
)
def test_near_patterns(pattern: str, near: str) -> None:
    assert nearest_pattern(pattern, PARAMETERS) == f"; did you mean {near!r}?"


@pytest.mark.parametrize("pattern", ["*bn*", "body.*", "*.gamma", "encoder.*.scale", "zzz", "*", "[", "encoder.1.*"])
def test_a_far_pattern_is_not_suggested(pattern: str) -> None:
    assert nearest_pattern(pattern, PARAMETERS) == ""


def test_long_lists_are_cut() -> None:
    assert shown(map(str, range(30))) == "'0', '1', '2', '3', '4', '5', '6', '7', … (30 in all)"
