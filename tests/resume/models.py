"""Modules that draw from every random generator and record what happened, and loaders that save their position."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from tests.lightning import LightningModule

BATCHES, SAMPLES = 6, 4


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(BATCHES * SAMPLES, 8, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


class PositionLoader:
    """Shuffles by its own epoch, which only its state holds, and saves its position."""

    def __init__(self, seed: int = 0) -> None:
        self.data, self.seed = data(), seed
        self.epoch, self.position, self.loaded = 0, 0, False

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[Tensor]]:
        if self.loaded:
            self.loaded = False
        else:
            self.epoch, self.position = self.epoch + 1, 0
        return self._batches()

    def _batches(self) -> Iterator[list[Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches = torch.randperm(len(self.data), generator=generator).split(SAMPLES)
        for indices in batches[self.position :]:
            self.position += 1
            yield list(self.data[indices])

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.epoch, self.position, self.loaded = state["seed"], state["epoch"], state["position"], True


class LazyLoader(PositionLoader):
    """Loader that uses a loaded position only when its first batch is read."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        yield from super().__iter__()


def shuffling() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=SAMPLES, shuffle=True)


def shuffling_by_itself() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=SAMPLES, shuffle=True, generator=torch.Generator().manual_seed(3))


class Net(LightningModule):
    """Draws from torch (dropout), Python and NumPy in training, and from torch in validation; records what happened."""

    def __init__(self, random: bool = True) -> None:
        super().__init__()
        dropout = nn.Dropout(0.3 if random else 0.0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), dropout, nn.Linear(16, 1))
        self.noise = float(random)
        self.mean, self.val_mean = MeanMetric(), MeanMetric()
        self.events: list[list[Any]] = []

    def record(self, what: str, **values: Tensor) -> None:
        if self.trainer.sanity_checking:
            return
        numbers = {name: float(value) for name, value in values.items()}
        self.events.append([what, self.trainer.current_epoch, self.trainer.global_step, numbers])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = (self.body(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.mean.update(loss.detach())
        self.record("train", loss=loss.detach())
        return loss * (1 + self.noise * 0.1 * (random.random() + float(np.random.rand())))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = (self.body(batch[0]) - batch[1] + self.noise * torch.randn_like(batch[1])).square().mean()
        self.log("val_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.val_mean.update(loss)

    def on_validation_epoch_end(self) -> None:
        self.log("val_mean", self.val_mean)
        batches = torch.tensor(self.trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.ready)
        self.record("validated", batches=batches, **self.trainer.callback_metrics)

    def on_train_epoch_start(self) -> None:
        self.record("epoch start", draw=self.noise * torch.rand(()))

    def on_train_epoch_end(self) -> None:
        self.log("mean", self.mean)
        self.record("epoch end", **self.trainer.callback_metrics)

    def on_train_end(self) -> None:
        self.record("end", **self.trainer.callback_metrics)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(), batch_size=8)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        of_ranks = [self.events] * self.trainer.world_size
        if len(of_ranks) > 1:
            torch.distributed.all_gather_object(of_ranks, self.events)
        checkpoint["events"] = [list(events) for events in of_ranks]
        for events in checkpoint["events"]:
            while events and events[-1][0] == "row" and "val_loss_step" in events[-1][-1]:
                events.pop()  # of a validation that is running: all of it will run again

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.events[:] = checkpoint["events"][self.global_rank]


class ShardedNet(Net):
    """Shards the layers with FSDP2: the first is a group of its own, the last belongs to the root."""

    def configure_model(self) -> None:
        fully_shard(self.body[0])
        fully_shard(self.body)


class NormNet(Net):
    """Module with BatchNorm, whose statistics are those of each rank's own batches, and without random numbers."""

    def __init__(self) -> None:
        super().__init__(random=False)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))


class ShardedNormNet(NormNet, ShardedNet):
    """Shards the layers of a net with BatchNorm."""


class PlateauNet(Net):
    """Steps a ReduceLROnPlateau at each epoch's end, and it cuts the rate each time."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class OneCycleNet(Net):
    """Module that reads the number of steps, so that data are loaded before any state is restored."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps, cycle_momentum=False)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class ManualNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class NetOfTwo(Net):
    """Module that trains on two loaders."""

    def training_step(self, batch: dict[str, list[Tensor]], batch_idx: int) -> Tensor:
        return super().training_step(
            [torch.cat(parts) for parts in zip(batch["a"], batch["b"], strict=True)], batch_idx
        )


class NetWithOneValidationBatch(Net):
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(), batch_size=len(data()))
