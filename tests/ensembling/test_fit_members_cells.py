"""Compare fit_members with a plain loop in every precision, with one process, DDP and FSDP2, also after a kill."""

from __future__ import annotations

import os
import signal
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lightning_optim import fit_members
from lightning_optim.ensembling.fit_members import member_seed
from tests.harness import models, regression
from tests.harness.cells import Cell, Precision, Strategy
from tests.harness.process_group import Group, JobFailed
from tests.harness.reference_loop import Formula, Loop, Weights, deviation
from tests.harness.run import make_trainer
from tests.lightning import Callback, LightningModule, Trainer

CELLS = [Cell("automatic", p, s, "1") for p, s in product(get_args(Precision), get_args(Strategy))]
SIZE = 2


def drawn_net() -> torch.nn.Module:
    """Make the network of the matrix with weights from the global generator."""
    return regression.Net(regression.FEATURES, seed=int(torch.randint(2**31, (1,))))


class Member(models.Model):
    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self.net = drawn_net()


class ShardedMember(Member):
    def configure_model(self) -> None:
        models.shard_(self.nets)


class Kill(Callback):
    """Kills the process after a number of batches, counted over all members."""

    def __init__(self, after: int) -> None:
        self.after, self.batches = after, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1
        if self.batches == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(cell: Cell, folder: Path, saves: bool = False, kill_after: int = 0) -> dict[str, Any]:
    """Call fit_members in this process; return the saved members, and the number of fits that began."""
    began: list[int] = []
    trainers: list[Trainer] = []
    kill = Kill(kill_after)

    def make_member(index: int) -> LightningModule:
        began.append(index)
        return (ShardedMember if cell.strategy == "fsdp2" else Member)(cell)

    def new_trainer(index: int) -> Trainer:
        trainers.append(make_trainer(cell, [kill] if kill_after else [], enable_checkpointing=saves))
        return trainers[-1]

    paths = fit_members(make_member, SIZE, new_trainer, None, dirpath=folder, seed=3)
    loaded = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    resumed = [trainer.ckpt_path is not None for trainer in trainers]
    return {"weights": loaded, "began": began, "resumed": resumed, "paths": paths}


def reference(cell: Cell, index: int) -> Weights:
    torch.manual_seed(member_seed(3, index))
    loop = Loop(cell, Formula())
    loop.net.load_state_dict(drawn_net().state_dict())
    return loop.run().final


def run(cell: Cell, group: Group, *arguments: Any) -> list[dict[str, Any]]:
    return [fit(cell, *arguments)] if cell.processes == 1 else group.run(fit, cell, *arguments)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell, group: Group, tmp_path: Path) -> None:
    expected_members = [reference(cell.whole, index) for index in range(SIZE)]
    for outcome in run(cell, group, tmp_path):
        assert outcome["paths"] == [str(tmp_path / f"member-{index}.ckpt") for index in range(SIZE)]
        for found, expected in zip(outcome["weights"], expected_members, strict=True):
            assert found.keys() == expected.keys()
            assert max(deviation(found, expected).values()) <= cell.tolerance
    assert max(deviation(*expected_members).values()) >= 20 * cell.tolerance, "the members differ"
    assert all(outcome["began"] == [] for outcome in run(cell, group, tmp_path))


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_processes_that_are_killed_end_with_the_same_members(strategy: Strategy, group: Group, tmp_path: Path) -> None:
    cell = Cell("automatic", "32-true", strategy, "1")
    expected = run(cell, group, tmp_path / "whole", True)[0]["weights"]
    with pytest.raises(JobFailed, match="Died: exit code -9"):
        # In the second member's second epoch.
        run(cell, group, tmp_path / "killed", True, 2 * cell.batches + cell.batches + 2)
    for outcome in run(cell, group, tmp_path / "killed", True):
        assert outcome["began"] == [1] and outcome["resumed"] == [True]
        assert same(outcome["weights"], expected)


def fit_elsewhere(cell: Cell, folder: Path) -> None:
    fit(cell, folder / str(torch.distributed.get_rank()))


def test_processes_that_see_different_files_are_refused(group: Group, tmp_path: Path) -> None:
    cell = Cell("automatic", "32-true", "ddp", "1")
    fit(cell.whole, tmp_path / "0")
    (tmp_path / "0" / "members.json").write_text('{"seed": 3, "members": [{"index": 0}]}')
    with pytest.raises(JobFailed, match="must be on a file system that all of them share"):
        group.run(fit_elsewhere, cell, tmp_path)
