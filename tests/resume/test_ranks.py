"""Test that tensors that differ between ranks, such as running statistics, survive a resume and a use."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_optim import (
    EMA,
    LAWA,
    SWA,
    EarlyStopping,
    GradientAccumulation,
    GradientClipping,
    OptimCallback,
    WeightAveraging,
)
from lightning_optim.averaging.batchnorm.statistics import statistics_layers
from lightning_optim.resume.exact_resume import ExactResume
from lightning_optim.runtime import callback_state
from tests.harness.process_group import Group
from tests.harness.run import LivingEnvironment, fsdp2, share_mesh
from tests.lightning import Callback, Checkpoint, DDPStrategy, Strategy, Trainer
from tests.resume.killed_runs import difference, fit
from tests.resume.models import SAMPLES, NormNet, PositionLoader, ShardedNormNet, data

VALIDATION_DUE, EPOCH = 3, 6  # batches


class Save(Checkpoint):
    """Write checkpoints at the end of each batch and epoch, and train on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"batch-{trainer.fit_loop.total_batch_idx + 1}")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"validated-{trainer.fit_loop.total_batch_idx + 1}")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.fit_loop.total_batch_idx + 1}")


def strategy_of(name: str) -> Strategy:
    if name.startswith("ddp"):
        return DDPStrategy(broadcast_buffers=name == "ddp")
    share_mesh()
    return fsdp2(save_distributed_checkpoint=name == "fsdp2, a folder")


def run(
    callbacks: list[Any],
    path: Path | None = None,
    strategy: str = "ddp",
    loader: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Train in a process of a living group, each rank with its own data."""
    rank = torch.distributed.get_rank()
    return fit(
        callbacks,
        loader or (lambda: PositionLoader(seed=10 * rank)),
        path,
        net=NormNet if strategy.startswith("ddp") else ShardedNormNet,
        devices=2,
        strategy=strategy_of(strategy),
        plugins=[LivingEnvironment()],
        use_distributed_sampler=False,
    )


def resumes(folder: Path, callbacks: Callable[[], list[Any]], strategy: str, names: list[str]) -> list[str]:
    """Job: return the differences of a run, the run that also saves, and those that resume from its checkpoints."""
    whole = run(callbacks(), strategy=strategy)
    found = {"saving": difference(run([*callbacks(), Save(folder)], strategy=strategy), whole)}
    for name in names:
        found[name] = difference(run(callbacks(), folder / name, strategy), whole)
    return [f"{name}: {what}" for name, what in found.items() if what]


# ---- the module's own buffers ----------------------------------------------------------------------------------------


def with_best() -> list[Any]:
    # Nothing improves by so much: the best is of the first check.
    return [ExactResume(), EarlyStopping("val_loss", patience=math.inf, min_delta=9.0)]


@pytest.mark.parametrize("strategy", ["fsdp2, a folder", "fsdp2, a file", "ddp that broadcasts no buffers"])
def test_buffers_of_ranks(strategy: str, group: Group, tmp_path: Path) -> None:
    names = ["batch-4", f"epoch-{EPOCH}"]
    assert group.run(resumes, tmp_path, with_best, strategy, names) == [[], []]


def in_a_window() -> list[Any]:
    return [ExactResume(), GradientAccumulation(4), WeightAveraging(EMA(0.9))]


def test_buffers_within_a_window(group: Group, tmp_path: Path) -> None:
    """Within a window DDP broadcasts no buffers; neither does the resumed run."""
    assert group.run(resumes, tmp_path, in_a_window, "ddp", ["batch-2", "batch-3"]) == [[], []]


def warnings_on_resume(folder: Path, strategy: str, exact: bool) -> list[str]:
    """Job: return the warnings about buffers when a run resumes."""

    def callbacks() -> list[Any]:
        return [GradientClipping(1.0), WeightAveraging(EMA(0.9)), *([ExactResume()] if exact else [])]

    run([*callbacks(), Save(folder)], strategy=strategy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(callbacks(), folder / f"epoch-{EPOCH}", strategy)
    return [str(warning.message) for warning in caught if "buffers of one rank" in str(warning.message)]


@pytest.mark.parametrize(
    ("strategy", "exact", "count"),
    [
        ("fsdp2, a folder", False, 1),
        ("fsdp2, a folder", True, 0),
        ("ddp that broadcasts no buffers", False, 1),
        ("ddp", False, 0),
    ],
)
def test_warns_of_lost_buffers(strategy: str, exact: bool, count: int, group: Group, tmp_path: Path) -> None:
    said, by_others = group.run(warnings_on_resume, tmp_path, strategy, exact)
    assert len(said) == count and not by_others
    assert all(
        "['body.1.running_mean', 'body.1.running_var']" in text and "Add `ExactResume()`" in text for text in said
    )


# ---- averages --------------------------------------------------------------------------------------------------------


def averaged() -> list[Any]:
    return [WeightAveraging(EMA(0.9), start=2), ExactResume()]


def averaged_with_memory() -> list[Any]:
    return [WeightAveraging(LAWA(2), start=2, buffers="average"), ExactResume()]


class FreezesStatistics(Callback):
    """Freezes BatchNorm from the second epoch on."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.current_epoch:
            statistics_layers(pl_module)[0].eval()


def averaged_after_an_estimate() -> list[Any]:
    return [FreezesStatistics(), WeightAveraging(SWA()), ExactResume()]


@pytest.mark.parametrize(
    ("strategy", "callbacks"),
    [
        ("ddp", averaged),
        ("fsdp2, a folder", averaged),
        ("fsdp2, a file", averaged_with_memory),
        ("fsdp2, a folder", averaged_after_an_estimate),
    ],
)
def test_averaged_statistics_of_ranks(
    strategy: str, callbacks: Callable[[], list[Any]], group: Group, tmp_path: Path
) -> None:
    """The first checkpoint is from before the average's start."""
    names = ["batch-2", f"batch-{EPOCH + VALIDATION_DUE}", f"validated-{VALIDATION_DUE}"]
    assert group.run(resumes, tmp_path, callbacks, strategy, names) == [[], []]


def of_rank() -> DataLoader[Any]:
    """Return a loader of this rank's own data in a fixed order, which saves no position."""
    half = EPOCH * SAMPLES // 2
    start = half * torch.distributed.get_rank()
    return DataLoader([data()[index] for index in range(start, start + half)], batch_size=SAMPLES // 2)


def average_without_exact_resume(folder: Path) -> str:
    """Job: return the difference after a resume at an epoch's end, where Lightning resumes the weights exactly."""
    whole = run([WeightAveraging(EMA(0.9)), Save(folder)], loader=of_rank)
    resumed = run([WeightAveraging(EMA(0.9))], folder / f"epoch-{EPOCH}", loader=of_rank)
    return difference({**resumed, "events": []}, {**whole, "events": []})


def test_averaged_statistics_need_no_exact_resume(group: Group, tmp_path: Path) -> None:
    assert group.run(average_without_exact_resume, tmp_path) == ["", ""]


class Buffers(Callback):
    """Keep the raw statistics at the end of training."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.raw = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}


def raw_buffers(average: bool) -> dict[str, torch.Tensor]:
    """Job: return the raw statistics of a run."""
    buffers = Buffers()
    run([buffers, *([WeightAveraging(EMA(0.9))] if average else [])])
    return buffers.raw


def test_an_average_changes_no_raw_statistics(group: Group) -> None:
    """DDP broadcasts buffers at a validation's first forward, and would find those of the average there."""
    for with_average, without in zip(group.run(raw_buffers, True), group.run(raw_buffers, False), strict=True):
        assert all(torch.equal(with_average[name], buffer) for name, buffer in without.items())


# ---- a user's callback -----------------------------------------------------------------------------------------------


class Seen(OptimCallback):
    """Sums, as a user's callback, the inputs of this rank, and counts the batches, which are as many on all ranks."""

    def reset(self) -> None:
        self.total, self.count = torch.zeros(()), 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.total, self.count = self.total + batch[0].sum(), self.count + 1

    def extra_state(self) -> dict[str, Any]:
        return {"seen": {"total": self.total}, "count": self.count}

    def rank_state(self) -> dict[str, torch.Tensor]:
        return {"seen/total": self.total}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self.total, self.count = extra["seen"]["total"], extra["count"]


def seen_by_rank(folder: Path) -> tuple[list[float], list[int]]:
    """Job: return the sums of the whole run and of the resumed one."""
    whole, resumed = Seen(), Seen()
    run([ExactResume(), whole, Save(folder)])
    run([ExactResume(), resumed], folder / "batch-4")
    return [float(whole.total), float(resumed.total)], [whole.count, resumed.count]


def test_rank_state_of_a_users_callback(group: Group, tmp_path: Path) -> None:
    (first, counts), (second, _) = group.run(seen_by_rank, tmp_path)
    assert first[0] == first[1] != second[0] == second[1]
    assert counts == [18, 18]


# ---- another number of ranks -----------------------------------------------------------------------------------------


def test_mean_for_another_number_of_ranks() -> None:
    by_rank = [{"averaged/mean": torch.tensor([1.0]), "count": torch.tensor(3)}, {"averaged/mean": torch.tensor([2.0])}]
    checkpoint = {"callbacks": {"key": {"averaged": {}, "count": torch.tensor(0), "of_each_rank": by_rank}}}
    callback_state.load_ranks(Trainer(accelerator="cpu", devices=1, logger=False), checkpoint, "key")
    assert checkpoint["callbacks"]["key"] == {"averaged": {"mean": torch.tensor([1.5])}, "count": torch.tensor(3)}
