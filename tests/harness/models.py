"""Lightning modules of the regression: automatic, manual, with two optimizers; each whole or sharded with FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from lightning_optim import ManualOptimizationMixin
from tests.harness import regression
from tests.harness.cells import MOMENTUM, Cell
from tests.harness.regression import Batch
from tests.lightning import LightningModule


class Batches:
    """Loader that saves its position, so that a resume in the middle of an epoch reads the remaining batches."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self._position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        start, self._position = self._position % len(self.batches), 0
        for index in range(start, len(self.batches)):
            self._position = index + 1
            yield self.batches[index]
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = state["position"]


class Model(LightningModule):
    """Module with automatic optimization.

    Args:
        cell: Cell of the matrix.
        scores: Values of ``val_score``, one for each validation, in their order.
    """

    def __init__(self, cell: Cell, scores: Sequence[float] = ()) -> None:
        super().__init__()
        self.cell = cell
        self.scores = tuple(scores)
        self.net = regression.build_nets(cell.optimizers)
        self.seen = 0
        self.validations: list[float] = []
        self.raw: dict[str, Tensor] = {}

    @property
    def nets(self) -> list[torch.nn.Module]:
        return regression.nets_of(self.net)

    def configure_optimizers(self) -> Any:
        return [SGD(net.parameters(), lr=self.cell.lr, momentum=MOMENTUM) for net in self.nets]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.seen += 1
        return regression.loss_of(0, self.nets, batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", regression.validation_loss(self.nets, batch), sync_dist=self.cell.processes > 1)

    def on_validation_epoch_end(self) -> None:
        if self.scores:
            self.log("val_score", self.scores[len(self.validations)])

    def on_validation_end(self) -> None:
        self.validations.append(float(self.trainer.callback_metrics["val_loss"]))

    def on_train_end(self) -> None:
        self.raw = full_weights(self)

    def train_dataloader(self) -> Batches:
        return Batches([self._part(batch) for batch in regression.make_batches(self.cell.batches, seed=10)])

    def val_dataloader(self) -> Batches:
        return Batches([self._part(regression.validation_batch())])

    def _part(self, batch: Batch) -> Batch:
        # The ranks' halves have one size, so that the mean of the ranks' means is the mean over the whole batch.
        x, y = (tensor.chunk(self.cell.processes)[self.global_rank] for tensor in batch)
        return x, y


class ManualModel(ManualOptimizationMixin, Model):
    """Module with manual optimization; with two optimizers each steps in every window."""

    def __init__(self, cell: Cell, scores: Sequence[float] = ()) -> None:
        super().__init__(cell, scores)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen += 1
        optimizers = self.optimizers()
        for index, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
            self.optimize(regression.loss_of(index, self.nets, batch), optimizer)


class ShardedModel(Model):
    """Module under FSDP2: one layer is sharded by itself, and the root holds the other parameters."""

    def configure_model(self) -> None:
        shard_(self.nets)


class ShardedManualModel(ManualModel):
    """Module under FSDP2 with manual optimization."""

    def configure_model(self) -> None:
        shard_(self.nets)


def shard_(nets: list[torch.nn.Module]) -> None:
    """Shard each network and the inner layer of the last one, unless that is done: later stages call it again."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(nets[0], FSDPModule):
        return
    fully_shard(nets[-1].get_submodule("inner"))
    for net in nets:
        fully_shard(net)


def build(cell: Cell, scores: Sequence[float] = ()) -> Model:
    """Make the module of a cell."""
    if cell.strategy == "fsdp2":
        return (ShardedModel if cell.kind == "automatic" else ShardedManualModel)(cell, scores)
    return (Model if cell.kind == "automatic" else ManualModel)(cell, scores)


@torch.no_grad()
def full_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copy all parameters, gathered from their shards; every rank must call this if they are sharded."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for part in module.modules():
        # After a validation the root is still gathered, and its parameters are copies of the shards.
        if isinstance(part, FSDPModule):
            part.reshard()
    weights = ((name, parameter.detach()) for name, parameter in module.named_parameters())
    return {name: (w.full_tensor() if isinstance(w, DTensor) else w).clone() for name, w in weights}
