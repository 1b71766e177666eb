"""Attributes of early stopping that are written later, before a fit or in it; Lightning's class is the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_optim import AllOf, AnyOf, Divergence, EarlyStopping, NonFinite, Plateau, Threshold
from tests.lightning import Callback, LightningModule, Trainer
from tests.lightning import callbacks as theirs
from tests.stopping.scripted_fits import Scripted, fit

NAN = math.nan
FLAT, FALLING = [1.0] * 7, [2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4]
RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


class Setting(Callback):
    """Set attributes of a callback at the start of an epoch."""

    def __init__(self, target: Any, epoch: int, attributes: dict[str, Any]) -> None:
        self.target, self.epoch, self.attributes = target, epoch, attributes

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            _write(self.target, self.attributes)


def _write(target: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(target, name, value)


def epochs(stop: Any, scores: list[float], epoch: int | None, attributes: dict[str, Any]) -> int:
    """Return the number of epochs of a run in which attributes are set before the fit, or at the start of an epoch."""
    if epoch is None:
        _write(stop, attributes)
    setting = [] if epoch is None else [Setting(stop, epoch, attributes)]
    return fit(Scripted(scores), stop, *setting, max_epochs=7).current_epoch


# Lightning's class does the same with these attributes, except for the sign of its `min_delta`.
@pytest.mark.parametrize(
    ("right", "scores", "epoch", "attributes"),
    [
        (2, FLAT, None, {"patience": 1}),
        (3, FLAT, 1, {"patience": 2}),
        (6, FLAT, 4, {"patience": 5}),
        (3, FALLING, None, {"min_delta": 1.0, "patience": 2}),
        (5, FALLING, 2, {"min_delta": 0.5, "patience": 3}),
        (3, FALLING, None, {"stopping_threshold": 1.85}),
        (4, FALLING, 3, {"stopping_threshold": 1.85}),
        (3, [1.0, 2.0, 30.0, 4.0, 5.0, 6.0, 7.0], None, {"divergence_threshold": 10.0}),
        (4, [1.0, 2.0, 30.0, 40.0, 5.0, 6.0, 7.0], 3, {"divergence_threshold": 10.0}),
        (7, [1.0, NAN, 1.0, 1.0, 1.0, 1.0, 1.0], None, {"check_finite": False}),
        (7, [1.0, 1.0, NAN, 1.0, 1.0, 1.0, 1.0], 1, {"check_finite": False}),
        (3, FLAT, 1, {"wait_count": 8, "patience": 10}),
        (3, FALLING, 1, {"best_score": torch.tensor(1.0), "patience": 2}),
        (2, FLAT, None, {"wait_count": 9, "best_score": torch.tensor(0.5), "patience": 11}),
        (2, RISING, None, {"patience": 1}),
    ],
)
def test_a_changed_attribute_counts(
    right: int, scores: list[float], epoch: int | None, attributes: dict[str, Any]
) -> None:
    assert epochs(EarlyStopping("val_loss", patience=math.inf), scores, epoch, attributes) == right
    signed = attributes | ({"min_delta": -attributes["min_delta"]} if "min_delta" in attributes else {})
    assert epochs(theirs.EarlyStopping("val_loss", patience=10), scores, epoch, signed) == right


@pytest.mark.parametrize("epoch", [None, 0])
def test_another_direction(epoch: int | None) -> None:
    rising: Any = {"score": RISING}
    assert epochs(EarlyStopping("score", patience=1), rising, epoch, {"mode": "max"}) == 7
    assert epochs(EarlyStopping("score", patience=1, mode="max"), rising, epoch, {"mode": "min"}) == 2
    stop = EarlyStopping("val_loss", stopping_threshold=0.0, divergence_threshold=99.0, best_by="val_loss")
    stop.mode = "max"
    assert [getattr(one, "mode", "max") for one in stop.criterion.criteria] == ["max"] * 4
    assert stop._best_by.mode == "max"
    assert stop.state_key == EarlyStopping("val_loss", mode="max").state_key


def test_a_direction_that_is_written_again_forgets_nothing() -> None:
    stop = EarlyStopping("val_loss", best_by="val_loss")
    stop._best_by.better({"val_loss": 1.0})
    stop.mode = "min"
    assert not stop._best_by.better({"val_loss": 2.0})


def test_another_metric() -> None:
    scores = {"one": FLAT, "other": FALLING}
    for stop in (EarlyStopping("one", patience=1), EarlyStopping(Plateau("one"))):
        stop.monitor = "other"
        assert fit(Scripted(scores), stop, max_epochs=7).current_epoch == 7
        assert stop.state_key == EarlyStopping("other").state_key
    stop.monitor = plateau = Plateau("one", patience=1)
    assert stop.criterion is plateau
    assert stop.monitor == "one"
    assert fit(Scripted(scores), stop, max_epochs=7).current_epoch == 2
    with pytest.raises(ValueError, match="best_by"):
        stop.monitor = AllOf([Plateau("one"), Plateau("other")])
    assert stop.criterion is plateau


def test_best_by_can_be_set_later() -> None:
    module = Scripted({"val_loss": FALLING[:4], "other": [2.0, 1.0, 3.0, 3.0]})
    stop = EarlyStopping("val_loss", restore_best=False)
    stop.best_by, stop.restore_best = "other", True
    fit(module, stop, max_epochs=4)
    assert stop.best_check == 1
    assert torch.equal(module.net[0].weight, module.seen[1]["net.0.weight"])
    stop.best_by = None
    fit(module, stop, max_epochs=4)
    assert stop.best_check == 3


def test_best_by_must_be_set_before_the_best_is_kept() -> None:
    stop = EarlyStopping(AllOf([Plateau("one"), Plateau("other")]), restore_best=False)
    with pytest.raises(ValueError, match="`best_by=None` leaves open"):
        stop.restore_best = True
    stop.best_by = "one"
    stop.restore_best = True
    with pytest.raises(ValueError, match="`best_by=None` leaves open"):
        stop.best_by = None
    assert (stop.restore_best, stop.best_by) == (True, "one")


def test_where_to_check_may_be_said_later() -> None:
    stop = EarlyStopping("val_loss", check_on_train_epoch_end=False)
    stop.check_on_train_epoch_end = True
    fit(Scripted(FALLING), stop, val_check_interval=0.5, max_epochs=2)
    assert len(stop.history) == 2
    fit(Scripted(FALLING), stop, Setting(stop, 1, {"check_on_train_epoch_end": False}), val_check_interval=0.5)
    assert len(stop.history) == 1 + 4 * 2


def test_dirpath_can_be_set_later(tmp_path: Any) -> None:
    stop = EarlyStopping("val_loss")
    assert stop.touches == {"weights"}
    module = Scripted(FALLING[:3])
    fit(module, stop, Setting(stop, 2, {"dirpath": str(tmp_path)}), max_epochs=3)
    assert stop.touches == set()
    assert stop.best_path == str(tmp_path / "best.ckpt")
    saved = torch.load(stop.best_path, weights_only=True)["state_dict"]
    assert torch.equal(saved["net.0.weight"], module.seen[2]["net.0.weight"])


def test_written_between_two_fits() -> None:
    """Start each fit from the beginning, with the values that were set since the fit before."""
    stop = EarlyStopping("val_loss", patience=3)
    fit(Scripted(FLAT), stop, max_epochs=7)
    assert stop.wait_count == 3
    stop.wait_count, stop.best_score = 1, 0.5
    assert (stop.wait_count, stop.best_score) == (1, 0.5)
    assert fit(Scripted(FLAT), stop, max_epochs=7).current_epoch == 2
    assert fit(Scripted(FLAT), stop, max_epochs=7).current_epoch == 4


def test_attributes_can_be_read_as_they_were_given() -> None:
    given = {"patience": 7, "min_delta": 0.25, "check_finite": False, "stopping_threshold": 0.5}
    stop = EarlyStopping("val_loss", divergence_threshold=9.0, mode="max", **given)
    assert {name: getattr(stop, name) for name in given} == given
    assert (stop.monitor, stop.mode, stop.divergence_threshold, stop.best_by) == ("val_loss", "max", 9.0, None)
    stop.check_finite, stop.stopping_threshold, stop.divergence_threshold = True, None, 8.0
    assert [type(one) for one in stop.criterion.criteria] == [NonFinite, Divergence, Plateau]
    assert stop.criterion.criteria[1].value == 8.0
    stop.stopping_threshold = 1.0
    assert [type(one) for one in stop.criterion.criteria] == [NonFinite, Threshold, Divergence, Plateau]
    assert (stop.stopping_threshold, stop.criterion.criteria[1].mode) == (1.0, "max")
    assert stop.best_score == -math.inf


def test_min_delta_is_a_size() -> None:
    stop = EarlyStopping("val_loss")
    stop.min_delta = -0.25
    assert stop.min_delta == 0.25


def test_attributes_of_a_criterion() -> None:
    """Read and write the arguments that the criterion has; refuse the others."""
    plateau = Plateau("x", patience=5, min_delta=0.5)
    stop = EarlyStopping(plateau)
    assert (stop.patience, stop.min_delta, stop.check_finite, stop.stopping_threshold) == (5, 0.5, False, None)
    stop.patience, stop.wait_count, stop.best_score, stop.mode = 2, 1, 3.0, "max"
    assert (plateau.patience, plateau.wait, plateau.best, plateau.mode) == (2, 1, 3.0, "max")
    stop.check_finite = False  # it is False already
    with pytest.raises(ValueError, match=r"`stopping_threshold=1.0` belongs to the criterion: pass it to Plateau"):
        stop.stopping_threshold = 1.0
    with pytest.raises(ValueError, match=r"`check_finite=True` belongs to the criterion"):
        stop.check_finite = True
    either = EarlyStopping(AnyOf([Threshold("x", 1.0), NonFinite("x")]))
    assert (either.patience, either.min_delta, either.wait_count, either.check_finite) == (None, None, 0, True)
    assert math.isnan(either.best_score)
    either.stopping_threshold = 2.0
    assert either.criterion.criteria[0].value == 2.0
    with pytest.raises(ValueError, match=r"`patience=1` belongs to a Plateau, which AnyOf\(.*\) does not have"):
        either.patience = 1


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("patience", -1, "`patience` must be an integer >= 0, got -1"),
        ("patience", 1.5, "`patience` must be an integer >= 0, got 1.5"),
        ("min_delta", NAN, "`min_delta` must be a number that is finite, got nan"),
        ("min_delta", "1", "`min_delta` must be a number that is finite, got '1'"),
        ("stopping_threshold", "0.5", "`stopping_threshold` must be a number that is finite, got '0.5'"),
        ("divergence_threshold", NAN, "`divergence_threshold` must be a number that is finite, got nan"),
        ("wait_count", -1, "`wait_count` must be an integer >= 0, got -1"),
        ("best_score", NAN, "`best_score` must be a number, which may be infinite, got nan"),
        ("best_score", torch.ones(2), "`best_score` must be a number"),
        ("mode", "lower", "`mode` must be one of 'min', 'max', got 'lower'"),
        ("monitor", 3, "`monitor` must be a metric's name, got 3"),
        ("best_by", 3, "`best_by` must be a metric's name"),
    ],
)
def test_wrong_values_raise_and_change_nothing(name: str, value: Any, sentence: str) -> None:
    stop = EarlyStopping("val_loss", stopping_threshold=1.0)
    before = getattr(stop, name), stop.state_dict()
    with pytest.raises(ValueError, match=sentence):
        setattr(stop, name, value)
    assert (getattr(stop, name), stop.state_dict()) == before
