"""TargetBatchSize accumulates as many micro-batches as make up the batch, for any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import GradientAccumulation, TargetBatchSize
from tests.harness import models, regression, run
from tests.harness.cells import Cell
from tests.harness.process_group import Group
from tests.harness.reference_loop import deviation
from tests.lightning import MisconfigurationException


@pytest.mark.parametrize(
    ("size", "batch", "ranks", "n"), [(256, 32, 1, 8), (256, 32, 3, 3), (10, 32, 1, 1), (33, 32, 1, 2)]
)
def test_micro_batches_of_a_target(size: int, batch: int, ranks: int, n: int) -> None:
    assert TargetBatchSize(size).micro_batches(batch, ranks) == n


class Loading(models.Model):
    def train_dataloader(self) -> Any:
        batches = regression.make_batches(self.cell.batches, seed=10)
        x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=regression.BATCH)

    def configure_optimizers(self) -> Any:
        self.estimated = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def test_the_loaders_batch_size_is_found_before_the_optimizers_are_made() -> None:
    cell = Cell("automatic", "32-true", "single", "4short")
    module = Loading(cell)
    accumulation = GradientAccumulation(TargetBatchSize(4 * regression.BATCH - 5))
    trainer = run.make_trainer(cell, [accumulation])
    trainer.fit(module)
    plain = models.build(cell)
    run.make_trainer(cell, [GradientAccumulation(4)]).fit(plain)
    assert module.estimated == 4 == accumulation.steps[0]
    assert max(deviation(module.raw, plain.raw).values()) < 1e-6
    assert trainer.accumulate_grad_batches == 1


def test_a_loader_without_a_batch_size_is_refused() -> None:
    cell = Cell("automatic", "32-true", "single", "1")
    with pytest.raises(MisconfigurationException, match=r"finds no `batch_size` on the training data .Batches."):
        run.make_trainer(cell, [GradientAccumulation(TargetBatchSize(64))]).fit(models.build(cell))


def _target(cell: Cell) -> tuple[list[int], dict[str, Tensor]]:
    accumulation = GradientAccumulation(
        TargetBatchSize(4 * regression.BATCH, micro_batch_size=regression.BATCH // cell.processes)
    )
    module = models.build(cell)
    run.make_trainer(cell, [accumulation]).fit(module)
    return accumulation.steps, module.raw


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["automatic", "two"])
def test_ranks_make_the_target_together(kind: Any, strategy: Any, group: Group) -> None:
    steps, wanted = _target(Cell(kind, "32-true", "single", "4short"))
    for its_steps, weights in group.run(_target, Cell(kind, "32-true", strategy, "4short")):
        assert its_steps == steps
        assert max(deviation(weights, wanted).values()) < 1e-6


@pytest.mark.parametrize("arguments", [{"size": 0}, {"size": 1.5}, {"size": 8, "micro_batch_size": 0}])
def test_a_wrong_target_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        TargetBatchSize(**arguments)
