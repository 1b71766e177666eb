"""A step that is not logged reads at most one value on the host, and does not write to gradients within the bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim import (
    AGC,
    AutoClip,
    Centralize,
    ClipByNorm,
    ClipByValue,
    GradientClipping,
    GradientMonitor,
    Noise,
    ZClip,
)
from tests.gradients.test_gradient_clipping import CELL, _fit
from tests.harness import models, run
from tests.harness.operators import Operators
from tests.lightning import Callback, LightningModule, Trainer


class Counting(Callback):
    """Count host reads within the hooks of our callbacks, by wrapping them."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.now = 0

    def wrap(self, callback: Any, name: str) -> None:
        inner = getattr(callback, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with Operators() as operators:
                result = inner(*args, **kwargs)
            self.now += operators.host_reads.total()
            return result

        setattr(callback, name, counted)

    def on_train_batch_start(self, *_: Any) -> None:
        self.now = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.reads.append(self.now)


POLICIES = [
    ClipByNorm(0.5),
    ClipByNorm(0.5, scope="tensor"),
    ClipByNorm(0.5, scope="group"),
    ClipByValue(0.1),
    AutoClip(),
    ZClip(warmup=2),
    AGC(),
    Centralize(),
    Noise(),
]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"nonfinite": "ignore"}, 0), ({"nonfinite": "skip"}, 1), ({"nonfinite": "skip", "spike": 1e6}, 1)],
)
def test_reads_from_the_device_in_a_step_that_is_not_logged(arguments: Any, expected: int) -> None:
    counting = Counting()
    ours = [GradientClipping(list(POLICIES), **arguments), GradientMonitor("parameter")]
    for callback in ours:
        for hook in (
            "on_before_optimizer_step",
            "on_after_optimizer_step",
            "on_train_batch_start",
            "on_train_batch_end",
        ):
            counting.wrap(callback, hook)
    run.make_trainer(CELL, [*ours, counting], max_epochs=4, log_every_n_steps=1000).fit(models.build(CELL))
    assert counting.reads == [expected] * 16


def test_the_counter_sees_a_read() -> None:
    with Operators() as operators:
        torch.ones(()).item()
    assert operators.host_reads.total() == 1


class Writes(Callback):
    """Store whether each step wrote to the gradients, between two hooks of a user's callback."""

    def __init__(self) -> None:
        self.written: list[bool] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.versions = [p.grad._version for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.written.append(self.versions != [p.grad._version for p in pl_module.parameters()])


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize(("max_norm", "written"), [(1e-3, True), (1e3, False)])
def test_gradients_with_a_norm_below_the_bound_are_not_touched(max_norm: float, written: bool, scope: Any) -> None:
    writes, monitor = Writes(), GradientMonitor()
    clipping = GradientClipping(ClipByNorm(max_norm, scope=scope))
    recorder = run.Recorder()
    run.make_trainer(CELL, [writes, monitor, clipping], logger=recorder).fit(models.build(CELL))
    assert writes.written == [written] * 8
    assert set(recorder.logged["gradients/share_clipped"].values()) == {float(written)}


def test_a_policy_with_a_history_gets_every_norm() -> None:
    clipping = GradientClipping([ClipByNorm(1e3), AutoClip(100.0)])
    _fit(clipping)
    assert len(clipping._copies[0][1].state_dict()["recent"]["rows"]) == 12
