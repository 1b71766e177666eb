"""A run that ended is resumed: no step is left, and module and averages are as at its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_optim import EMA, SWA, CheckpointAveraging, EarlyStopping, WeightAveraging
from tests.averaging.models import Model, assert_equal, fit, norm_net, plain_net, snapshot
from tests.lightning import ModelCheckpoint


def saver(path: Path, top: int = 2) -> ModelCheckpoint:
    return ModelCheckpoint(path, monitor="val_loss", save_top_k=top, save_last=True)


AVERAGES: dict[str, Callable[[], list[Any]]] = {
    "evaluated": lambda: [WeightAveraging(EMA(0.9))],
    "only read out": lambda: [WeightAveraging(EMA(0.9), apply_at_end=False)],
    "at the end": lambda: [WeightAveraging(SWA(), evaluate=False)],
    "two and the best": lambda: [
        WeightAveraging(SWA(), compare=True),
        WeightAveraging(EMA(0.8), evaluate=False, apply_at_end=False),
        EarlyStopping("val_loss", patience=math.inf),
    ],
}


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("net", [plain_net, norm_net])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_averages_are_taken_over(tmp_path, make, net, precision) -> None:
    whole, resumed, first, second = Model(net()), Model(net()), make(), make()
    arguments = {"enable_checkpointing": True, "max_epochs": 2, "precision": precision}
    fit(whole, [*first, saver(tmp_path)], **arguments)
    fit(resumed, [*second, saver(tmp_path)], **arguments, ckpt=tmp_path / "last.ckpt")
    assert_equal(snapshot(resumed), snapshot(whole))
    for one, other in zip(first, second, strict=True):
        if isinstance(one, WeightAveraging):
            with one.averaged_weights(whole), other.averaged_weights(resumed):
                assert_equal(snapshot(resumed), snapshot(whole))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("net", [plain_net, norm_net])
def test_checkpoints_are_averaged(tmp_path, greedy, net) -> None:
    def callbacks() -> list[Any]:
        return [WeightAveraging(EMA(0.9)), CheckpointAveraging(top=2, greedy=greedy), saver(tmp_path)]

    whole, resumed, first, second = Model(net()), Model(net()), callbacks(), callbacks()
    fit(whole, first, enable_checkpointing=True, max_epochs=2)
    trainer = fit(resumed, second, enable_checkpointing=True, max_epochs=2, ckpt=tmp_path / "last.ckpt")
    assert first[1].score == second[1].score
    assert greedy or first[1].score is not None
    assert_equal(snapshot(resumed), snapshot(whole))
    # What is saved then goes on as the run itself would.
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    longer = []
    for name in ("last.ckpt", "after.ckpt"):
        longer.append(Model(net()))
        fit(longer[-1], callbacks(), enable_checkpointing=True, max_epochs=3, ckpt=tmp_path / name)
    assert_equal(snapshot(longer[0]), snapshot(longer[1]))


def test_a_fit_without_steps_leaves_the_module_alone(tmp_path) -> None:
    model = Model()
    before = snapshot(model)
    callbacks = [WeightAveraging(SWA()), EarlyStopping("val_loss"), CheckpointAveraging(top=2), saver(tmp_path)]
    fit(model, callbacks, enable_checkpointing=True, max_epochs=0)
    assert_equal(snapshot(model), before)
