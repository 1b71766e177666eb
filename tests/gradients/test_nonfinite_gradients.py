"""A thousand faults on one rank of two: training goes on, weights stay finite, ranks stay equal."""

from __future__ import annotations

import random
import zlib
from typing import Any

import pytest
import torch

from lightning_optim import AGC, AutoClip, ClipByNorm, GradientClipping, GradientMonitor, ZClip
from tests.harness import models, run
from tests.harness.cells import Cell
from tests.harness.process_group import Group
from tests.lightning import Callback, LightningModule, Trainer

FAULTS = 250  # in each of four runs
VALUES = (float("nan"), float("inf"), float("-inf"))


class Faults(Callback):
    """Put NaN or infinity into random gradients of random steps on one rank, in at most ten steps in a row."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.row = self.count = self.longest = 0

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # All ranks draw the same, so that they know of each other's faults.
        faulty = self.row < 10 and self.random.random() < 0.7
        self.row = self.row + 1 if faulty else 0
        self.longest = max(self.longest, self.row)
        self.count += faulty
        rank = self.random.randrange(trainer.world_size)
        places = [(self.random.random(), self.random.choice(VALUES)) for _ in list(pl_module.parameters())]
        if not faulty or rank != trainer.global_rank:
            return
        hit = False
        for parameter, (chance, value) in zip(pl_module.parameters(), places, strict=True):
            grad = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
            if grad.numel() and (chance < 0.3 or not hit):
                grad.view(-1)[int(chance * grad.numel())] = value
                hit = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = self.count >= FAULTS and self.row == 0


def job(cell: Cell, seed: int) -> dict[str, Any]:
    policies = [AutoClip(50.0), ZClip(warmup=5), AGC(0.1), ClipByNorm(0.5)]
    clipping, monitor, faults = GradientClipping(policies), GradientMonitor(), Faults(seed)
    trainer = run.make_trainer(cell, [clipping, monitor, faults], max_epochs=-1, limit_val_batches=0)
    module = models.build(cell)
    before = models.full_weights(module)
    trainer.fit(module)
    after = models.full_weights(module)
    statistics = clipping._copies.state_dict()[0]
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "faults": faults.count,
        "longest": faults.longest,
        "skipped": clipping.skipped,
        "weights": after,
        "moved": max(float((after[name] - before[name]).abs().max()) for name in before),
        "statistics": [statistics[0]["recent"]["rows"], statistics[1]["statistics"]],
        "monitored": monitor.skipped,
        "scaler": None if scaler is None else scaler.state_dict(),
    }


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_training_goes_on(strategy: Any, precision: Any, group: Group) -> None:
    cell = Cell("automatic", precision, strategy, "1")
    first, second = group.run(job, cell, zlib.crc32(str(cell).encode()))
    assert first["faults"] == second["faults"] >= FAULTS
    assert first["longest"] == 10
    for name, weight in first["weights"].items():
        assert weight.isfinite().all(), name
        assert torch.equal(weight, second["weights"][name]), f"the ranks differ in {name}"
    for mine, theirs in zip(first["statistics"], second["statistics"], strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs)
    assert first["moved"] > 0.01
    assert first["skipped"] == second["skipped"] == first["monitored"]
    assert first["scaler"] == second["scaler"]


class OneRank(Callback):
    """Put NaN into the gradients of the second rank in every step."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 1:
            for parameter in pl_module.parameters():
                getattr(parameter.grad, "_local_tensor", parameter.grad).fill_(float("nan"))


def refused(cell: Cell, arguments: dict[str, Any]) -> str:
    trainer = run.make_trainer(cell, [GradientClipping(1.0, **arguments), OneRank()], limit_val_batches=0)
    with pytest.raises(RuntimeError) as error:
        trainer.fit(models.build(cell))
    return str(error.value)


@pytest.mark.parametrize("arguments", [{"nonfinite": "raise"}, {"max_consecutive_skips": 2}])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_ranks_raise_and_report_their_gradients(strategy: Any, arguments: dict[str, Any], group: Group) -> None:
    first, second = group.run(refused, Cell("automatic", "32-true", strategy, "1"), arguments)
    where = f"batch {arguments.get('max_consecutive_skips', 0)} the norm of its gradients is nan"
    assert where in first
    assert where in second
    assert first.endswith("On this rank all are finite.")
    assert "'net.inner.weight'" in second
