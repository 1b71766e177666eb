"""Compare an ensemble with plain torch in every precision, with one process, DDP and FSDP2."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_optim import Ensemble
from tests.harness import models, regression
from tests.harness.cells import Cell, Precision, Strategy
from tests.harness.process_group import Group, JobFailed
from tests.harness.reference_loop import autocast
from tests.harness.run import make_trainer
from tests.lightning import LightningModule, ModelParallelStrategy

CELLS = [Cell("automatic", p, s, "1") for p, s in product(get_args(Precision), get_args(Strategy))]
SEEDS = (1, 5, 6)
SHARPNESS = 30.0  # Confident members: the loss of the mean is then far from that of each.


class Member(models.Model):
    """Classify with the network of the matrix; log the loss, and a metric that is not a mean of means over ranks."""

    def __init__(self, cell: Cell, seed: int) -> None:
        super().__init__(cell)
        self.net = regression.Net(regression.FEATURES, seed)
        with torch.no_grad():
            self.net.scale.mul_(SHARPNESS)
        self.recall = MulticlassAccuracy(regression.TARGETS, average="macro")
        self.ended = 0

    def validation_step(self, batch: models.Batch, batch_idx: int) -> None:
        logits = self.net(batch[0]).float()
        labels = batch[1].argmax(1)
        self.recall(logits, labels)
        self.log("recall", self.recall)
        self.log("val_loss", cross_entropy(logits, labels), sync_dist=self.cell.processes > 1)

    def on_validation_epoch_end(self) -> None:
        self.ended += 1


class ShardedMember(Member):
    """Shard the network for FSDP2."""

    def configure_model(self) -> None:
        models.shard_(self.nets)


def build(cell: Cell) -> list[LightningModule]:
    return [(ShardedMember if cell.strategy == "fsdp2" else Member)(cell, seed) for seed in SEEDS]


def validate(cell: Cell) -> dict[str, Any]:
    """Validate the ensemble twice in this process; return the metrics, and the members afterwards."""
    members = build(cell)
    before = [{name: value.clone() for name, value in member.state_dict().items()} for member in members]
    ensemble = Ensemble(members, outputs="logits", on="net")
    trainer = make_trainer(cell, [])
    results = [trainer.validate(ensemble, verbose=False)[0] for _ in range(2)]
    changed = [
        name
        for m, state in zip(members, before, strict=True)
        for name, v in m.state_dict().items()
        if (v != state[name]).any()
    ]
    sharded = any(type(p).__name__ == "DTensor" for p in ensemble.parameters())
    return {"results": results, "ended": ensemble.ended, "changed": changed, "sharded": sharded}


@torch.no_grad()
def reference(cell: Cell, seeds: tuple[int, ...]) -> dict[str, float]:
    """Average the softmax over the members in float64, after a forward in the cell's precision."""
    x, y = regression.validation_batch()
    total: Tensor = torch.zeros(())
    for member in [Member(cell, seed) for seed in seeds]:
        with autocast(cell.precision):
            logits = member.net(x)
        total = total + logits.double().softmax(1) / len(seeds)
    labels = y.argmax(1)
    right = total.argmax(1) == labels
    recall = torch.stack([right[labels == c].double().mean() for c in range(regression.TARGETS)]).mean()
    return {"val_loss": float(-total.log()[torch.arange(len(labels)), labels].mean()), "recall": float(recall)}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell, group: Group) -> None:
    expected = reference(cell.whole, SEEDS)
    outcomes = [validate(cell)] if cell.processes == 1 else group.run(validate, cell)
    for outcome in outcomes:
        for result in outcome["results"]:
            assert result == pytest.approx(expected, rel=cell.value_tolerance, abs=cell.value_tolerance)
        assert outcome["ended"] == 2 and outcome["changed"] == []
        assert outcome["sharded"] == (cell.strategy == "fsdp2")
    for seeds in ((SEEDS[0],), SEEDS[:2], SEEDS[1:]):
        effect = abs(reference(cell.whole, seeds)["val_loss"] - expected["val_loss"])
        assert effect >= 20 * cell.value_tolerance, "one member, or a missing one, must show"


def save(cell: Cell, path: Path) -> None:
    """Write a checkpoint of whole tensors from a sharded ensemble in this process, and test from it."""
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    trainer = make_trainer(cell, [], strategy=strategy)
    expected = trainer.validate(Ensemble(build(cell), outputs="logits", on="net"), verbose=False)
    trainer.save_checkpoint(path)
    again = [ShardedMember(cell, seed + 10) for seed in SEEDS]
    assert trainer.validate(Ensemble(again, outputs="logits", on="net"), ckpt_path=path, verbose=False) == expected


def test_a_sharded_ensemble_is_saved_whole(group: Group, tmp_path: Path) -> None:
    cell = Cell("automatic", "32-true", "fsdp2", "1")
    group.run(save, cell, tmp_path / "ensemble.ckpt")
    members = [Member(cell.whole, seed) for seed in SEEDS]
    blank = [Member(cell.whole, seed + 10) for seed in SEEDS]
    loaded = Ensemble.load_from_checkpoint(tmp_path / "ensemble.ckpt", members=blank)
    x = regression.validation_batch()[0]
    assert torch.equal(loaded.net(x), Ensemble(members, outputs="logits", on="net").net(x))


def validate_unsharded(cell: Cell) -> None:
    make_trainer(cell, []).validate(Ensemble([Member(cell, 1)], outputs="values", on="net"), verbose=False)


def test_fsdp2_of_members_that_shard_nothing_is_refused(group: Group) -> None:
    with pytest.raises(JobFailed, match="sharded in `configure_model`, which Member does not override"):
        group.run(validate_unsharded, Cell("automatic", "32-true", "fsdp2", "1"))


def ensemble_of_sharded(cell: Cell) -> str:
    member = ShardedMember(cell, 1)
    make_trainer(cell, []).validate(member, verbose=False)
    with pytest.raises(ValueError, match="`members` must be whole, and this ShardedMember is sharded") as error:
        Ensemble([member], outputs="values", on="net")
    return str(error.value)


def test_members_that_are_sharded_already_are_refused(group: Group) -> None:
    assert len(group.run(ensemble_of_sharded, Cell("automatic", "32-true", "fsdp2", "1"))) == 2
