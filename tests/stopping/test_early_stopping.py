"""Test when the callback reads the metric, stops and logs; Lightning's class is the oracle where both do the same."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import pytest
import torch

from lightning_optim import AllOf, AnyOf, EarlyStopping, Plateau, Threshold
from lightning_optim.stopping.criteria import Criterion
from tests.lightning import Callback, EarlyStoppingReason, LightningModule, MisconfigurationException, Trainer, has
from tests.lightning import callbacks as theirs
from tests.stopping.scripted_fits import Scripted, fit, same, trainer, weights

NAN = math.nan
DIPS = [5.0, 4.0, 4.0, 3.0, 3.5, 3.5, 3.5, 3.5]

HAS_REASONS = has("EarlyStoppingReason")  # Lightning's callback has one from 2.6 on, ours with each version


def outcome(stop: Any, scores: list[float], **options: Any) -> dict[str, Any]:
    """Return what can be read off a run afterwards."""
    running = fit(Scripted(scores), stop, **({"max_epochs": 8} | options))
    reasons = {"reason": stop.stopping_reason, "said": bool(stop.stopping_reason_message)} if HAS_REASONS else {}
    return {
        "epochs": running.current_epoch,
        "steps": running.global_step,
        "stopped_epoch": stop.stopped_epoch,
        "wait_count": stop.wait_count,
        "best_score": float(stop.best_score),
        **reasons,
    }


@pytest.mark.parametrize(
    ("arguments", "scores", "options"),
    [
        ({"patience": 2}, DIPS, {}),
        ({"patience": math.inf}, DIPS, {}),
        ({"patience": 0}, DIPS, {}),
        ({"patience": 1, "mode": "max"}, DIPS, {}),
        ({"patience": 2, "min_delta": 0.75}, DIPS, {}),
        ({"patience": 2, "min_delta": 1.0, "mode": "max"}, [-score for score in DIPS], {}),
        ({"stopping_threshold": 3.25}, DIPS, {}),
        ({"stopping_threshold": 3.0}, DIPS, {}),
        ({"divergence_threshold": 4.5, "patience": math.inf}, [4.0, 4.5, 4.6], {}),
        ({"divergence_threshold": -1.0, "mode": "max", "patience": math.inf}, [0.0, -1.0, -1.5], {}),
        ({"patience": math.inf}, [4.0, NAN, 3.0], {}),
        ({"patience": 2, "check_finite": False}, [4.0, NAN, 3.0, NAN, NAN, 1.0], {}),
        ({"patience": 3}, DIPS, {"val_check_interval": 0.5}),
        ({"patience": 2}, DIPS, {"check_val_every_n_epoch": 2}),
        ({"patience": 2, "check_on_train_epoch_end": True}, DIPS, {"val_check_interval": 0.5}),
        ({"patience": 2, "check_on_train_epoch_end": False}, DIPS, {}),
        ({"patience": 1}, DIPS, {"min_epochs": 6}),
        ({"patience": 1}, DIPS, {"min_steps": 22}),
        ({"patience": 1}, DIPS, {"fast_dev_run": 2}),
        ({"patience": 2}, DIPS, {"num_sanity_val_steps": 1}),
    ],
    ids=str,
)
def test_it_does_what_lightnings_does(arguments: dict[str, Any], scores: list[float], options: dict[str, Any]) -> None:
    named: Any = {"score": scores}  # by its name either direction may be the better one
    ours = outcome(EarlyStopping("score", **arguments), named, **options)
    assert ours == outcome(theirs.EarlyStopping("score", **arguments), named, **options)


@pytest.mark.parametrize(
    ("options", "checks"),
    [
        ({}, 3),
        ({"val_check_interval": 0.5}, 6),
        ({"check_val_every_n_epoch": 3}, 1),
        ({"fast_dev_run": 1}, 0),
        ({"num_sanity_val_steps": 2}, 3),
    ],
)
def test_one_check_after_each_validation(options: dict[str, Any], checks: int) -> None:
    stop = EarlyStopping("val_loss", patience=math.inf)
    running = fit(Scripted(DIPS), stop, **({"max_epochs": 3} | options))
    assert len(stop.history) == checks
    running.validate(running.lightning_module, running.val_dataloaders, verbose=False)
    assert len(stop.history) == checks, "a validation outside of a fit is no check"


def test_a_second_fit_finds_out_anew_where_to_check() -> None:
    stop = EarlyStopping("val_loss", patience=math.inf)
    fit(Scripted(DIPS), stop, max_epochs=2)
    fit(Scripted(DIPS), stop, max_epochs=2, val_check_interval=0.25)
    assert len(stop.history) == 8
    fit(Scripted(DIPS), stop, max_epochs=3)
    assert len(stop.history) == 3
    assert [values["val_loss"] for values in stop.history] == DIPS[:3]


# ---- subclasses ------------------------------------------------------------------------------------------------------


class WarmUp:
    """Read no metric in the first epochs."""

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        if trainer.current_epoch >= 4:
            super()._run_early_stopping_check(trainer)


class EveryOther:
    def _should_skip_check(self, trainer: Trainer) -> bool:
        return super()._should_skip_check(trainer) or trainer.current_epoch % 2 == 0


class AtBatchEnd:
    """Read the metric in another hook, and only there."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._run_early_stopping_check(trainer)

    def _should_skip_check(self, trainer: Trainer) -> bool:
        return True


class InHook:
    """Read the metric in the hook itself, without `super()`."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._run_early_stopping_check(trainer)


class Chosen:
    """Set an attribute of Lightning's class."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self._check_on_train_epoch_end = False


@pytest.mark.parametrize(
    ("mixin", "arguments", "stopped_epoch"),
    [
        (WarmUp, {"patience": 2}, 6),
        (EveryOther, {"patience": 1}, 5),
        (AtBatchEnd, {"patience": 2, "strict": False, "check_on_train_epoch_end": False}, 1),
        (Chosen, {"patience": 2}, 5),
        (InHook, {"patience": 2, "check_on_train_epoch_end": False}, 5),
    ],
)
def test_subclasses_of_lightnings_class_do_the_same_here(mixin: Any, arguments: Any, stopped_epoch: int) -> None:
    found = [
        outcome(type("Theirs", (mixin, base), {})("val_loss", **arguments), DIPS)
        for base in (EarlyStopping, theirs.EarlyStopping)
    ]
    assert found[0] == found[1] and found[0]["stopped_epoch"] == stopped_epoch


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_an_overridden_hook_needs_no_super(at_epoch_end: bool) -> None:
    hooks = {name: lambda *_: None for name in ("on_train_epoch_end", "on_validation_end")}
    kind = type("Own", (EarlyStopping,), hooks)
    arguments: Any = {"patience": 2, "check_on_train_epoch_end": at_epoch_end}
    assert outcome(kind("val_loss", **arguments), DIPS) == outcome(EarlyStopping("val_loss", **arguments), DIPS)


@pytest.mark.parametrize("name", ["_evaluate_stopping_criteria", "_validate_condition_metric"])
def test_a_subclass_whose_method_would_not_be_called_is_refused(name: str) -> None:
    assert hasattr(theirs.EarlyStopping, name)
    stop = type("Own", (EarlyStopping,), {name: lambda *_: True})("val_loss")
    with pytest.raises(MisconfigurationException, match=rf"overrides \['{name}'\] .* subclass of `Criterion`"):
        fit(Scripted(DIPS), stop)


# ---- before it may stop ----------------------------------------------------------------------------------------------


def test_a_stop_is_withdrawn_when_the_metric_improves_before_min_epochs() -> None:
    """Lightning's stops at the fourth epoch, although the second asked for it and all since were better."""
    scores = [1.0, 2.0, 0.5, 0.4, 0.3, 0.2]
    stop = EarlyStopping("val_loss", patience=1)
    assert fit(Scripted(scores), stop, min_epochs=4, max_epochs=6).current_epoch == 6
    assert (stop.stopped_epoch, stop.stopping_reason_message) == (0, None)
    assert stop.stopping_reason.name == "NOT_STOPPED"
    assert not HAS_REASONS or stop.stopping_reason is EarlyStoppingReason.NOT_STOPPED
    assert fit(Scripted(scores), theirs.EarlyStopping("val_loss", patience=1), min_epochs=4).current_epoch == 4


@pytest.mark.parametrize("scores", [[1.0, 2.0, 1.5, 1.5, 1.5, 1.5], [1.0, 2.0, NAN, 1.5, 1.5, 1.5]])
def test_a_stop_stays_when_it_does_not(scores: list[float]) -> None:
    stop = EarlyStopping("val_loss", patience=1)
    assert fit(Scripted(scores), stop, min_epochs=4, max_epochs=6).current_epoch == 4
    assert stop.stopped_epoch == 3


def test_only_an_improvement_withdraws_a_stop() -> None:
    stop = EarlyStopping(Threshold("val_loss", 0.5))
    assert fit(Scripted([1.0, 0.4, 0.6, 0.6, 0.6, 0.6]), stop, min_epochs=4, max_epochs=6).current_epoch == 4
    assert stop.stopped_epoch == 1
    either = AnyOf([Threshold("val_loss", 0.5), Plateau("other", patience=math.inf)])
    scores = {"val_loss": [1.0, 0.4, 0.6, 0.6, 0.6, 0.6], "other": [5.0, 5.0, 5.0, 4.0, 4.0, 4.0]}
    stop = EarlyStopping(either, best_by="other")
    assert fit(Scripted(scores), stop, min_epochs=4, max_epochs=6).current_epoch == 6


class Ending(Callback):
    """Set `should_stop` in an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.should_stop = True


@pytest.mark.parametrize("scores", [[1.0, 0.9, 0.8, 0.7, 0.6, 0.5], [1.0, 2.0, 0.8, 0.7, 0.6, 0.5]])
def test_a_stop_that_other_code_requested_is_not_withdrawn(scores: list[float]) -> None:
    two = [EarlyStopping("val_loss", patience=1), EarlyStopping("val_loss", patience=1, name="second")]
    assert fit(Scripted(scores), *two, Ending(1), min_epochs=4, max_epochs=6).current_epoch == 4
    assert fit(Scripted(scores), EarlyStopping("val_loss", patience=1), Ending(1), min_epochs=4).current_epoch == 4


@pytest.mark.parametrize("other", [EarlyStopping, theirs.EarlyStopping])
def test_a_stop_of_another_early_stopping_is_not_withdrawn(other: Any) -> None:
    scores = {"val_loss": [1.0, 0.9, 2.0, 0.5, 0.4, 0.3], "other": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]}
    stops = [EarlyStopping("val_loss", patience=1), other("other", patience=1)]
    for callbacks in (stops, stops[::-1]):
        assert fit(Scripted(scores), *callbacks, min_epochs=4, max_epochs=6).current_epoch == 4
    scores["other"] = [1.0, 0.9, 0.9, 0.8, 0.7, 0.6]
    if other is EarlyStopping:
        assert fit(Scripted(scores), *stops, min_epochs=4, max_epochs=6).current_epoch == 6


# ---- the metric ------------------------------------------------------------------------------------------------------


def test_a_missing_metric() -> None:
    with pytest.raises(RuntimeError, match=r"Early stopping reads 'x', which is not logged\. .*'train_loss.*val_loss"):
        fit(Scripted(DIPS), EarlyStopping("x"))
    with pytest.raises(RuntimeError, match="reads 'y'"):
        fit(Scripted(DIPS), EarlyStopping("val_loss", best_by=["val_loss", "y"]))
    silent = EarlyStopping("x", strict=False)
    with pytest.warns(UserWarning, match=r"read no value of \['x'\] in the whole fit"):
        assert fit(Scripted(DIPS), silent, max_epochs=2).current_epoch == 2
    assert silent.history == []
    with pytest.warns(RuntimeWarning, match="reads 'x'") as told:
        fit(Scripted(DIPS), EarlyStopping("x", strict=False, verbose=True), max_epochs=1)
    assert not [warning for warning in told if "in the whole fit" in str(warning.message)]


def test_a_metric_that_appears_later() -> None:
    """Ignore validations without it."""

    class Late(Scripted):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.current_epoch > 1:
                super().validation_step(batch, batch_idx)

    stop = EarlyStopping("val_loss", strict=False, patience=1)
    module = Late([9.0, 9.0, 2.0, 3.0, 4.0])
    assert fit(module, stop).current_epoch == 4
    assert (stop.best_check, [values["val_loss"] for values in stop.history]) == (0, [2.0, 3.0])
    assert same(weights(module), module.seen[2])


# ---- the best --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("best_by", "mode", "best"),
    [
        (None, "min", 2),
        ("other", "min", 1),
        ("other", "max", 3),
        ({"val_loss": 1.0, "other": 2.0}, "min", 1),
        ({"val_loss": 1.0, "other": -2.0}, "min", 3),
        (["tie", "other"], "min", 1),
        (["tie", "val_loss"], "min", 2),
    ],
)
def test_best_by(best_by: Any, mode: str, best: int) -> None:
    scores = {
        "val_loss": [4.0, 3.0, 1.0, 2.0],
        "other": [4.0, 0.5, 3.0, 5.0],
        "tie": [2.0, 1.0, 1.0, 3.0],
    }
    module = Scripted(scores)
    stop = EarlyStopping(Plateau("val_loss", patience=math.inf), best_by=best_by, mode=mode)
    fit(module, stop, max_epochs=4)
    assert stop.best_check == best
    assert same(weights(module), module.seen[best])


def test_best_by_says_what_is_kept_and_the_criterion_when_to_stop() -> None:
    scores = {"val_loss": [1.0, 2.0, 2.0, 2.0, 2.0], "other": [5.0, 4.0, 3.0, 2.0, 1.0]}
    module, stop = Scripted(scores), EarlyStopping("val_loss", patience=3, best_by="other")
    assert fit(module, stop).current_epoch == 4
    assert stop.best_check == 3
    assert same(weights(module), module.seen[3])


def test_a_second_fit_has_its_own_best() -> None:
    stop = EarlyStopping("val_loss", patience=math.inf, best_by="val_loss")
    fit(Scripted([0.1, 0.2]), stop, max_epochs=2)
    module = Scripted([3.0, 2.0, 2.5])
    fit(module, stop, max_epochs=3)
    assert stop.best_check == 1
    assert same(weights(module), module.seen[1])


def test_without_an_improvement_the_module_keeps_its_weights() -> None:
    module, stop = Scripted([NAN, NAN]), EarlyStopping("val_loss", check_finite=False)
    fit(module, stop, max_epochs=2)
    assert stop.best_check == -1
    assert same(weights(module), module.seen[1])


# ---- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "scores", "reason", "message"),
    [
        (lambda: EarlyStopping("val_loss", patience=2), [1.0, 2.0, 2.0], "PATIENCE_EXHAUSTED", "in the last 2 checks"),
        (lambda: EarlyStopping("val_loss"), [1.0, NAN], "NON_FINITE_METRIC", "'val_loss' = nan is not finite"),
        (lambda: EarlyStopping("val_loss", stopping_threshold=0.5), [1.0, 0.25], "STOPPING_THRESHOLD", "= 0.25 < 0.5"),
        (lambda: EarlyStopping("val_loss", divergence_threshold=3.0), [1.0, 4.0], "DIVERGENCE_THRESHOLD", "4.0 > 3.0"),
        (lambda: EarlyStopping(Threshold("val_loss", 0.5)), [1.0, 0.25], "STOPPING_THRESHOLD", "= 0.25 < 0.5"),
        (
            lambda: EarlyStopping(AllOf([Threshold("val_loss", 0.5), Plateau("val_loss", patience=1)])),
            [0.4, 0.4],
            "PATIENCE_EXHAUSTED",
            "threshold reached: 'val_loss' = 0.4.* did not improve",
        ),
        (lambda: EarlyStopping(Own()), [1.0, 1.0], "PATIENCE_EXHAUSTED", "^Enough.$"),
    ],
)
def test_the_reason(make: Any, scores: list[float], reason: str, message: str) -> None:
    stop = make()
    running = fit(Scripted(scores), stop, max_epochs=9)
    assert running.current_epoch == len(scores)
    assert stop.stopped_epoch == len(scores) - 1
    assert stop.stopping_reason.name == reason
    assert not HAS_REASONS or stop.stopping_reason is EarlyStoppingReason[reason]
    assert (stop.best_check == -1) == isinstance(stop.criterion, Own), "it never says what is the best"
    assert re.search(message, stop.stopping_reason_message)


class Own(Criterion):
    """Stop at the second validation."""

    monitors = ("val_loss",)
    checks = 0

    def update(self, metrics: Any) -> bool:
        self.checks += 1
        self.reason = "Enough." if self.checks > 1 else ""
        return self.checks > 1


def test_verbose_tells_of_improvements_and_of_the_stop(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger(theirs.early_stopping.__name__)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    with caplog.at_level(logging.INFO, logger.name):
        fit(Scripted([2.0, 1.5, 3.0]), EarlyStopping("val_loss", patience=1, verbose=True))
    said = [record.message for record in caplog.records if "val_loss" in record.message]
    assert said == [
        "Metric val_loss improved. New best score: 2.000.",
        "Metric val_loss improved by 0.500 >= min_delta = 0.0. New best score: 1.500.",
        "Monitored metric 'val_loss' did not improve in the last check. Best score: 1.500.",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger.name):
        fit(Scripted([2.0, 1.5, 3.0]), EarlyStopping("val_loss", patience=1))
        fit(Scripted([0.4]), EarlyStopping(Threshold("val_loss", 0.5), verbose=True))
    assert [record.message for record in caplog.records if "val_loss" in record.message] == [
        "Stopping threshold reached: 'val_loss' = 0.4000000059604645 < 0.5."
    ]


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    stop = EarlyStopping(AnyOf([Plateau("val_loss", patience=1), Threshold("other", 0.0)]), best_by="val_loss")
    fit(Scripted({"val_loss": [2.0, 1.0, 3.0], "other": [5.0, 6.0, 7.0]}), stop)
    figure, axes = stop.plot()
    (loss, star), (other, other_star) = ([*one.lines] for one in figure.axes)
    assert loss.get_xydata().tolist() == [[1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]
    assert other.get_xydata().tolist() == [[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]
    assert [star.get_xydata().tolist(), other_star.get_xydata().tolist()] == [[[2.0, 1.0]], [[2.0, 6.0]]]
    assert axes is figure.axes[0]
    assert " ".join(figure.get_suptitle().split()) == "Stopped in epoch 2: no improvement"
    assert [one.get_ylabel() for one in figure.axes] == ["val_loss", "other"]
    given = matplotlib.pyplot.subplots()[1]
    assert stop.plot(ax=given)[1] is given and given.get_title() == figure.get_suptitle()
    labels = ["val_loss", "best validation, 2: 1", "other", "best validation, 2: 6"]
    assert [line.get_label() for line in given.lines] == labels
    assert [line.get_label() for line in stop.plot("other")[1].lines] == labels[2:]
    with pytest.raises(ValueError, match="must be one of 'val_loss', 'other', got 'loss'"):
        stop.plot("loss")
    with pytest.raises(RuntimeError, match="nothing to plot yet: no validation with 'val_loss' has ended"):
        EarlyStopping("val_loss").plot()
    matplotlib.pyplot.close("all")


# ---- two callbacks ---------------------------------------------------------------------------------------------------


def test_two_callbacks_on_one_metric_need_names() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(EarlyStopping("val_loss"), EarlyStopping("val_loss", patience=math.inf))
    first, second = EarlyStopping("val_loss", patience=1), EarlyStopping("val_loss", patience=math.inf, name="second")
    fit(Scripted([1.0, 2.0, 3.0]), first, second)
    assert (first.stopped_epoch, second.stopped_epoch, second.wait_count) == (1, 0, 1)
    assert first.state_key != second.state_key


def test_two_names_are_two_files(tmp_path: Any) -> None:
    one = EarlyStopping("val_loss", dirpath=str(tmp_path))
    two = EarlyStopping("val_loss", dirpath=str(tmp_path), name="second", best_by={"other": -1.0})
    module = Scripted({"val_loss": [1.0, 2.0, 3.0], "other": [1.0, 2.0, 3.0]})
    fit(module, one, two, max_epochs=3)
    assert (one.best_path, two.best_path) == (str(tmp_path / "best.ckpt"), str(tmp_path / "second.ckpt"))
    for path, index in ((one.best_path, 0), (two.best_path, 2)):
        assert same(torch.load(path, weights_only=True)["state_dict"], module.seen[index])
    fit(Scripted([1.0]), one, max_epochs=1)
    assert one.best_path == str(tmp_path / "best-v1.ckpt"), "the best of an earlier run is not overwritten"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-v1.ckpt", "best.ckpt", "second.ckpt"]
