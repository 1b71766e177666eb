"""The same training on one process, with DDP and with FSDP2 on two: it ends at the same weights.

Penalty, accumulation (with a last window that is not full), clipping by the norm of all gradients and an EMA, on
scikit-learn's digits. Each rank takes its half of every batch, so that the mean over ranks is the mean over the batch::

    pip install -c constraints.txt -e ".[examples]" && torchrun --nproc-per-node 2 examples/distributed.py
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_optim import (
    EMA,
    L2,
    ClipByNorm,
    GradientAccumulation,
    GradientClipping,
    WeightAveraging,
    WeightRegularization,
)

Batch = tuple[Tensor, Tensor]


class Network(LightningModule):
    """Three linear layers; under FSDP2 the first is a group of its own, and the rest are the root's."""

    def __init__(self, shard: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shard = shard
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))

    def configure_model(self) -> None:
        if self.shard and not isinstance(self.layers, FSDPModule):
            fully_shard(self.layers[0])
            fully_shard(self.layers)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.layers(images), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_nll", cross_entropy(self.layers(images), labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def batches(part: slice, rank: int, ranks: int) -> DataLoader:
    """Batches of 64 of the digits, of which a rank gets its share."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    whole = zip((images.float() / 16)[part].split(64), labels[part].split(64), strict=True)
    return DataLoader([(x.chunk(ranks)[rank], y.chunk(ranks)[rank]) for x, y in whole], batch_size=None)


def train(strategy: Strategy, processes: int) -> tuple[dict[str, Tensor], float]:
    """Return the weights at the end, whole, and the metrics of the last validation."""
    network = Network(shard=isinstance(strategy, ModelParallelStrategy))
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=processes,
        # Within torchrun, one process by itself must be told that it is alone.
        plugins=[LightningEnvironment()] if processes == 1 else [],
        use_distributed_sampler=False,
        max_epochs=5,
        callbacks=[
            GradientAccumulation(4),
            WeightRegularization(L2(1e-3)),
            GradientClipping(ClipByNorm(0.5)),
            WeightAveraging(EMA(0.8)),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rank = int(os.environ["RANK"]) if processes > 1 else 0
    # 18 batches: windows of 4, 4, 4, 4 and 2.
    trainer.fit(network, batches(slice(0, 1152), rank, processes), batches(slice(1152, 1792), rank, processes))
    return {name: whole(p) for name, p in network.named_parameters()}, float(trainer.callback_metrics["val_nll"])


def whole(parameter: Tensor) -> Tensor:
    """Return the whole of a parameter that may be sharded."""
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def main() -> None:
    """Train three times, and compare."""
    if os.environ.get("WORLD_SIZE") != "2":
        raise SystemExit("start it with: torchrun --nproc-per-node 2 examples/distributed.py")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    strategies: dict[str, Any] = {
        "DDP": DDPStrategy(process_group_backend="gloo"),
        "FSDP2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }
    results = {name: train(strategy, 2) for name, strategy in strategies.items()}
    alone, loss = train(SingleDeviceStrategy(), 1)
    if os.environ["RANK"] != "0":
        return
    print(f"one process: validation NLL {loss:.6f}")
    for name, (weights, its_loss) in results.items():
        difference = max((weights[key] - alone[key]).abs().max().item() for key in alone)
        print(f"{name} on two: validation NLL {its_loss:.6f}, largest difference of a weight {difference:.1e}")
        if difference > 1e-5:
            raise SystemExit(f"{name} ended elsewhere")


if __name__ == "__main__":
    main()
