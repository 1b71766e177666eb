"""Parameters that are frozen and unfrozen, and estimated vectors, on two processes."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from torch.nn.utils.parametrizations import spectral_norm

from lightning_optim import EMA, SWA, WeightAveraging
from tests.averaging.models import Model, assert_equal, data, differ, snapshot, two_processes
from tests.harness.cells import Cell
from tests.harness.models import build, full_weights
from tests.harness.process_group import Group, JobFailed
from tests.lightning import ModelCheckpoint


def _sharded(folder: str, whole_files: bool, plan: str) -> list[Any]:
    """Train layers in turn in one run, and in a run that is interrupted and resumed with the same layers trainable."""

    def run(name: str, epochs: int, ckpt: str | None = None) -> list[Any]:
        module = build(Cell("automatic", "32-true", "fsdp2", "1"))
        # Under FSDP2 torch restores no optimizer state of what is frozen, and no single file without any state.
        kind = torch.optim.Adam if whole_files else torch.optim.SGD
        module.configure_optimizers = lambda: kind(module.parameters(), lr=0.01)

        def choose(epoch: int) -> None:
            late = epoch > 0 if plan == "unfrozen" else epoch == 0
            module.net.requires_grad_(True)
            next(iter(module.net.children())).requires_grad_(late)

        choose(0 if plan == "unfrozen" or ckpt is None else 2)
        module.on_train_epoch_start = lambda: choose(module.current_epoch)
        saved = ModelCheckpoint(f"{folder}/{name}", filename="{epoch}", save_top_k=-1)
        average = WeightAveraging(EMA(0.8))
        changes = {"enable_checkpointing": True, "max_epochs": epochs}
        two_processes([average, saved], folders=not whole_files, **changes).fit(module, ckpt_path=ckpt)
        return [full_weights(module), module.raw, module.validations[-1], len(average.averaged_state())]

    whole, _ = run("whole", 4), run("first", 2)
    return [whole, run("second", 4, f"{folder}/first/epoch=1.ckpt")]


@pytest.mark.parametrize(
    ("plan", "whole_files"), [("unfrozen", False), ("frozen", True)], ids=["unfrozen, a folder", "frozen, one file"]
)
def test_shards_that_are_frozen_or_not_at_the_resume_are_averaged_on(
    group: Group, plan: str, whole_files: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for whole, resumed in group.run(_sharded, folder, whole_files, plan):
            for one, other in zip(whole[:2], resumed[:2], strict=True):
                assert_equal(other, one)
            assert resumed[2:] == whole[2:]
            assert differ(whole[0], whole[1])


class Normed(Model):
    def __init__(self) -> None:
        super().__init__(make=lambda: torch.nn.Sequential(spectral_norm(torch.nn.Linear(6, 5)), torch.nn.Linear(5, 1)))

    def train_dataloader(self) -> Any:
        batches = [(x[self.global_rank :: 2], y[self.global_rank :: 2]) for x, y in data(size=6)]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class ShardedNormed(Normed):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net)


def _normed(sharded: bool, buffers: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    model = ShardedNormed() if sharded else Normed()
    two_processes([WeightAveraging(SWA(), buffers=buffers)], sharded).fit(model)
    if sharded:
        return 1.0, {name: buffer.clone() for name, buffer in model.named_buffers()}
    return float(torch.linalg.matrix_norm(model.net[0].weight.detach(), 2)), snapshot(model)


def test_vectors_of_spectral_norm_are_the_same_on_all_ranks(group: Group) -> None:
    (largest, state), (_, other) = group.run(_normed, False)
    assert largest == pytest.approx(1.0, abs=1e-3)
    assert_equal(state, other)


def test_vectors_of_a_sharded_weight_are_refused_unless_they_are_copied(group: Group) -> None:
    with pytest.raises(JobFailed, match=r"no rank holds the whole weight of .* `buffers=\{"):
        group.run(_normed, True)
    assert len(group.run(_normed, True, {"*_u": "copy", "*_v": "copy"})) == 2
