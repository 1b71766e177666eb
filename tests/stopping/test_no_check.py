"""EarlyStopping that read its metric in no validation says so once, at the end, and what to look at."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from lightning_optim import EarlyStopping, Plateau
from tests.lightning import Callback, LightningModule
from tests.stopping.scripted_fits import Scripted, data, fit, trainer


def said(module: Any, *callbacks: Callback, **options: Any) -> list[str]:
    """Return the warnings of a fit that are about early stopping."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, *callbacks, **options)
    return [str(one.message) for one in caught if "EarlyStopping" in str(one.message)]


class NeverLogs(Scripted):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", 1.0)


NO_CHECK: dict[str, Any] = {
    "no validation": (
        Scripted,
        {},
        {"limit_val_batches": 0, "check_val_every_n_epoch": 2},
        r"no validation ran: set `Trainer\(limit_val_batches=…\)` above 0.*`check_on_train_epoch_end=True`",
    ),
    "a validation that is never due": (
        Scripted,
        {},
        {"check_val_every_n_epoch": 9},
        r"ended before its first validation.*val_check_interval=1.0, check_val_every_n_epoch=9\)`: choose less",
    ),
    "a metric that is not logged": (
        NeverLogs,
        {"strict": False},
        {},
        r"'val_loss' was never logged\. Log it in `validation_step`, or in `.*; logged metrics: 'accuracy'",
    ),
    "a metric of a validation without a loader": (
        Scripted,
        {"strict": False},
        {"validates": False},
        r"no validation ran: pass a validation loader, as in `trainer\.fit\(model, train_loader, val_dataloaders=",
    ),
    "only after validations": (
        Scripted,
        {"check_on_train_epoch_end": False},
        {"limit_val_batches": 0},
        "no validation ran",
    ),
}


@pytest.mark.parametrize("what", NO_CHECK)
def test_no_check_is_told_once(what: str) -> None:
    module, arguments, options, reason = NO_CHECK[what]
    stop = EarlyStopping("val_loss", **arguments)
    (sentence,) = said(module(), stop, **options)
    assert sentence.startswith("EarlyStopping read no value of ['val_loss'] in the whole fit, and so neither")
    assert re.search(reason, sentence), sentence
    assert not stop.history


class DoesNotValidate(Scripted):
    validation_step = LightningModule.validation_step


MISSING: dict[str, Any] = {
    "no loader": (
        Scripted,
        "val_loss",
        {"validates": False},
        "no validation runs: pass a validation loader, as in",
    ),
    "no step": (DoesNotValidate, "val_loss", {}, "no validation runs: define `validation_step`"),
    "no batches": (
        Scripted,
        "val_loss",
        {"limit_val_batches": 0},
        "no validation runs: set `Trainer(limit_val_batches=",
    ),
    "not yet": (Scripted, "val_loss", {"check_val_every_n_epoch": 2}, "no validation has run yet"),
    "not logged": (NeverLogs, "val_loss", {}, "is not logged. Log it in `validation_step`"),
    "another name": (Scripted, "train_los", {"limit_val_batches": 0}, "not logged; did you mean 'train_loss'?"),
}


@pytest.mark.parametrize("what", MISSING)
def test_a_check_without_the_metric_says_whether_a_validation_ran(what: str) -> None:
    module, monitor, options, reason = MISSING[what]
    with pytest.raises(RuntimeError, match=re.escape(reason)) as raised:
        fit(module(), EarlyStopping(monitor, check_on_train_epoch_end=True), **options)
    assert ("Log it in `" in str(raised.value)) == ("not logged" in reason)


def test_what_each_check_has_told_is_not_told_again() -> None:
    sentences = said(NeverLogs(), EarlyStopping("val_loss", strict=False, verbose=True))
    assert sentences == []


class ChecksLater(EarlyStopping):
    """Makes its check in another hook."""

    def _should_skip_check(self, trainer: Any) -> bool:
        return True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.callback_metrics.get("val_loss") is not None:
            self._run_early_stopping_check(trainer)


class ChecksByItself(EarlyStopping):
    """Decides by itself, without the check of the class."""

    def _run_early_stopping_check(self, trainer: Any) -> None:
        pass


CHECKED: dict[str, Any] = {
    "one check": (EarlyStopping("val_loss"), {"max_epochs": 1}),
    "a criterion": (EarlyStopping(Plateau("val_loss")), {}),
    "another hook": (ChecksLater("val_loss"), {}),
    "an override of the check": (ChecksByItself("val_loss"), {}),
    "a metric of training": (
        EarlyStopping("train_loss", check_on_train_epoch_end=True),
        {"limit_val_batches": 0},
    ),
    "a trial run": (EarlyStopping("val_loss"), {"fast_dev_run": True, "check_val_every_n_epoch": 9}),
    "nothing to train": (EarlyStopping("val_loss"), {"max_epochs": 0}),
}


@pytest.mark.parametrize("what", CHECKED)
def test_nothing_is_said_where_nothing_is_wrong(what: str) -> None:
    stop, options = CHECKED[what]
    assert said(Scripted(), stop, **options) == []


def test_each_fit_is_told_of_by_itself() -> None:
    stop = EarlyStopping("val_loss")
    assert said(Scripted(), stop) == []
    assert len(said(Scripted(), stop, check_val_every_n_epoch=9)) == 1


@pytest.mark.parametrize("checked", [True, False])
def test_a_resumed_run_without_a_check(checked: bool, tmp_path: Any) -> None:
    """The values before the interruption count: only a run that has read none since its start is told."""
    first = trainer(EarlyStopping("val_loss"), max_epochs=2, check_val_every_n_epoch=2 if checked else 9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "EarlyStopping read no value")
        first.fit(Scripted(), data(), data(seed=1))
    first.save_checkpoint(tmp_path / "last.ckpt")
    stop = EarlyStopping("val_loss")
    options: dict[str, Any] = {"ckpt_path": tmp_path / "last.ckpt", "max_epochs": 3}
    sentences = said(Scripted(), stop, check_val_every_n_epoch=2 if checked else 9, **options)
    assert len(sentences) == (0 if checked else 1)
    assert len(stop.history) == (1 if checked else 0)


def test_a_metric_of_training_is_logged_in_training_step() -> None:
    with pytest.raises(RuntimeError, match="Log it in `training_step` with `on_epoch=True` and pass `check_"):
        fit(Scripted(), EarlyStopping("train_accuracy", mode="max"))
