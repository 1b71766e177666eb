"""Lazy layers that a run uses later, or never."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim import EMA, LAWA, SWA, EarlyStopping, WeightAveraging
from tests.averaging.models import Model, assert_close, assert_equal, ema, fit, mean, snapshot

DECAY = 0.8


class Later(Model):
    """A model that uses its lazy layers from an epoch on."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.later, self.epoch = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d()), epoch
        self.first: dict[str, Tensor] = {}
        self.trajectory_of_later: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.later(x) if self.current_epoch >= self.epoch else x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch >= self.epoch and not self.first:
            self.first = snapshot(self.later)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trajectory.append(snapshot(self.net))
        if self.current_epoch >= self.epoch:
            self.trajectory_of_later.append(snapshot(self.later))

    def on_validation_end(self) -> None:
        pass


@pytest.mark.parametrize("average", [EMA(DECAY, warmup=None), SWA(), LAWA(24)], ids=repr)
def test_a_lazy_layer_that_is_used_later_is_averaged_from_its_first_weights(average: Any) -> None:
    def wanted(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return ema(states, DECAY) if isinstance(average, EMA) else mean(states)

    model = Later(epoch=1)
    fit(model, [WeightAveraging(average, buffers="average")], max_epochs=3)
    assert_close(snapshot(model.net), wanted(model.trajectory))
    later = [model.first] * 8 + model.trajectory_of_later
    assert_close(snapshot(model.later), wanted(later), ["0.weight", "0.bias", "1.weight", "1.bias"])
    buffers = [later[8]] * 8 + later[8:]  # a buffer is first looked at after the step
    assert_close(snapshot(model.later), wanted(buffers), ["1.running_mean", "1.running_var"])


@pytest.mark.parametrize("average", [EMA(DECAY), SWA(), LAWA(3)], ids=repr)
def test_a_lazy_layer_that_is_never_used_changes_nothing(average: Any) -> None:
    model, callback = Later(epoch=9), WeightAveraging(average)
    fit(model, [callback, EarlyStopping("val_loss", patience=math.inf)])
    assert all(map(is_lazy, model.later.parameters()))
    assert callback.averaged_state().keys() == {f"net.{name}" for name in model.trajectory[0]}


def test_a_lazy_layer_is_averaged_in_the_resumed_run_too(tmp_path: Path) -> None:
    def run(epochs: int, ckpt: Any = None) -> tuple[Model, Any]:
        model = Later(epoch=1)
        torch.manual_seed(1)
        trainer = fit(model, [WeightAveraging(SWA(), buffers="average")], max_epochs=epochs, ckpt=ckpt)
        return model, trainer

    _, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = run(3, tmp_path / "two.ckpt")
    whole, _ = run(3)
    assert_equal(snapshot(resumed), snapshot(whole))
