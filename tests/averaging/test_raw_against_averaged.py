"""``compare=True``: the same metrics of raw and averaged weights in loggers, callback and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import EMA, AnyOf, EarlyStopping, ExactResume, Plateau, WeightAveraging
from tests.averaging.models import Model, fit
from tests.lightning import Callback, Logger, ModelCheckpoint


def comparing() -> WeightAveraging:
    return WeightAveraging(EMA(0.8, warmup=None), compare=True)


class Saves(Callback):
    """A callback that saves at the first call of a hook in the second epoch."""

    def __init__(self, path: Path, hook: str) -> None:
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1 and not self.path.exists():
            trainer.save_checkpoint(self.path)


BEFORE_THE_END = ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("hook", [*BEFORE_THE_END, "on_validation_end", "on_train_epoch_end"])
def test_a_resumed_run_has_all_points(tmp_path, hook: str, exact: bool, first: bool) -> None:
    found = []
    for ckpt in (None, tmp_path / "one.ckpt"):
        average, saves = comparing(), Saves(tmp_path / "one.ckpt", hook)
        callbacks = [saves, average] if first else [average, saves]
        fit(Model(), [*callbacks, *([ExactResume()] if exact else [])], ckpt=ckpt, max_epochs=3)
        found.append(average.comparison.points)
    whole, resumed = found
    assert [point["step"] for point in whole] == [8, 16, 24]
    assert all(point["raw"].keys() == point["averaged"].keys() == {"val_loss"} for point in whole)
    if not exact and hook in BEFORE_THE_END:  # the rest of that validation is never run
        whole[1] = {**whole[1], "averaged": {}}
    assert resumed == whole


class Heard(Logger):
    """A logger that records each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, float]] = []

    name = version = None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append({**metrics, "at": step})


def test_the_raw_score_is_logged_beside_the_other(tmp_path) -> None:
    """At one step of the loggers, and in ``callback_metrics``, where callbacks monitor it."""
    heard, average = Heard(), comparing()
    files = ModelCheckpoint(tmp_path, monitor="averaging/raw/val_loss")
    trainer = fit(Model(), [average, files], logger=heard, enable_checkpointing=True)
    calls = [call for call in heard.calls if "val_loss" in call]
    points = average.comparison.points
    assert [call["val_loss"] for call in calls] == [point["averaged"]["val_loss"] for point in points]
    assert [call["averaging/raw/val_loss"] for call in calls] == [point["raw"]["val_loss"] for point in points]
    assert [call["at"] for call in calls] == [7, 15]
    assert len([call for call in heard.calls if "averaging/raw/val_loss" in call]) == 2
    assert float(files.best_model_score) == min(point["raw"]["val_loss"] for point in points)
    assert float(trainer.logged_metrics["averaging/raw/val_loss"]) == points[-1]["raw"]["val_loss"]


def test_points_are_complete_when_a_validation_ends() -> None:
    seen = []

    class Reads(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            point = average.comparison.points[-1]
            seen.append((point["averaged"]["val_loss"], float(trainer.callback_metrics["val_loss"])))

    average = comparing()
    fit(Model(), [Reads(), average])
    assert len(seen) == 2
    assert all(one == other for one, other in seen)


def test_what_is_logged_at_the_epochs_end_is_compared() -> None:
    class Late(Model):
        def on_validation_epoch_end(self) -> None:
            self.log("late", self.net[0].weight.sum())

    average = comparing()
    model = Late()
    fit(model, [average])
    for point, epoch in zip(average.comparison.points, (1, 2), strict=True):
        raw = model.trajectory[8 * epoch - 1]["net.0.weight"].sum()
        assert point["raw"]["late"] == pytest.approx(float(raw))
        assert point["averaged"]["late"] != point["raw"]["late"]


def test_a_module_that_saves_in_its_validation_saves_once_and_with_the_average(tmp_path) -> None:
    class Saving(Model):
        saves = 0

        def on_validation_end(self) -> None:
            super().on_validation_end()
            self.trainer.save_checkpoint(tmp_path / "one.ckpt")

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.saves += 1

    model = Saving()
    fit(model, [comparing()])
    assert model.saves == 2
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    (state,) = saved["callbacks"].values()
    assert len(state["comparison"]) == 2


class Foreign(Callback):
    """A callback whose ``criterion`` is another thing than ours, and leads back to itself."""

    monitor, mode = "other", "max"

    @property
    def criterion(self) -> Any:
        return self

    criteria = property(lambda self: [self])


def test_criteria_of_other_packages_are_not_followed() -> None:
    average = comparing()
    fit(Model(), [average, Foreign(), EarlyStopping(AnyOf(Plateau("val_loss")))])
    assert average.comparison.modes == {"val_loss": "min", "other": "max"}
