"""What each rank has of its own, such as running statistics of its batches, survives a resume and a use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_optim import EMA, WeightAveraging
from lightning_optim.resume import ExactResume
from tests.machine.groups import Group
from tests.machine.run import LivingEnvironment
from tests.resume_helpers import difference, fit
from tests.resume_models import SAMPLES, NormNet, PositionLoader, data

VALIDATION_DUE, EPOCH = 3, 6  # batches


class Save(Checkpoint):
    """Writes checkpoints at each batch's and each epoch's end, and trains on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"batch-{trainer.global_step}")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.global_step}")


def of_rank() -> DataLoader[Any]:
    """Each rank has its own data, in one order, at no position that a checkpoint could hold."""
    half = EPOCH * SAMPLES // 2
    start = half * torch.distributed.get_rank()
    return DataLoader([data()[index] for index in range(start, start + half)], batch_size=SAMPLES // 2)


def run(callbacks: list[Any], path: Path | None = None, loader: Any = None) -> dict[str, Any]:
    """One fit in a process of a living group."""
    rank = torch.distributed.get_rank()
    return fit(
        callbacks,
        loader or (lambda: PositionLoader(seed=10 * rank)),
        path,
        net=NormNet,
        devices=2,
        strategy=DDPStrategy(),
        plugins=[LivingEnvironment()],
        use_distributed_sampler=False,
    )


def average_of_ranks(folder: Path) -> list[str]:
    """A job: what differs between a run, the run that also saves, and those resumed from what it saved."""

    def callbacks() -> list[Any]:
        return [WeightAveraging(EMA(0.9)), ExactResume()]

    whole = run(callbacks())
    found = {"saving": difference(run([*callbacks(), Save(folder)]), whole)}
    for name in ("batch-2", f"batch-{VALIDATION_DUE}", f"epoch-{EPOCH}"):
        found[name] = difference(run(callbacks(), folder / name), whole)
    return [f"{name}: {what}" for name, what in found.items() if what]


def test_averaged_statistics_of_ranks(group: Group, tmp_path: Path) -> None:
    assert group.run(average_of_ranks, tmp_path) == [[], []]


def average_without_exact_resume(folder: Path) -> str:
    """A job: whether weights differ after a resume at an epoch's end, where Lightning resumes them exactly."""
    whole = run([WeightAveraging(EMA(0.9)), Save(folder)], loader=of_rank)
    resumed = run([WeightAveraging(EMA(0.9))], folder / f"epoch-{EPOCH}", of_rank)
    return difference({**resumed, "events": []}, {**whole, "events": []})


def test_averaged_statistics_need_no_exact_resume(group: Group, tmp_path: Path) -> None:
    assert group.run(average_without_exact_resume, tmp_path) == ["", ""]
