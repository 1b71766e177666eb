"""A run that can be killed: a model that draws from every generator, loaders, and who writes a file and dies."""

from __future__ import annotations

import os
import random
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_optim.resume import ExactResume
from tests.machine.run import LivingEnvironment

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
    """The same, but it takes a loaded position when the first batch is asked for."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        yield from super().__iter__()


def shuffling() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=SAMPLES, shuffle=True)


def shuffling_by_itself() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=SAMPLES, shuffle=True, generator=torch.Generator().manual_seed(3))


class Net(LightningModule):
    """Draws from torch (dropout), Python and NumPy in training, and from torch in validation; tells what happened."""

    def __init__(self, random: bool = True) -> None:
        super().__init__()
        dropout = nn.Dropout(0.3 if random else 0.0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), dropout, nn.Linear(16, 1))
        self.noise = float(random)
        self.mean, self.val_mean = MeanMetric(), MeanMetric()
        self.events: list[list[Any]] = []

    def tell(self, what: str, **values: Tensor) -> None:
        if self.trainer.sanity_checking:
            return
        numbers = {name: float(value) for name, value in values.items()}
        self.events.append([what, self.trainer.current_epoch, self.trainer.global_step, numbers])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = (self.body(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.mean.update(loss.detach())
        self.tell("train", loss=loss.detach())
        return loss * (1 + self.noise * 0.1 * (random.random() + float(np.random.rand())))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = (self.body(batch[0]) - batch[1] + self.noise * torch.randn_like(batch[1])).square().mean()
        self.log("val_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.val_mean.update(loss)

    def on_validation_epoch_end(self) -> None:
        self.log("val_mean", self.val_mean)
        batches = torch.tensor(self.trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.ready)
        self.tell("validated", batches=batches, **self.trainer.callback_metrics)

    def on_train_epoch_start(self) -> None:
        self.tell("epoch start", draw=self.noise * torch.rand(()))

    def on_train_epoch_end(self) -> None:
        self.log("mean", self.mean)
        self.tell("epoch end", **self.trainer.callback_metrics)

    def on_train_end(self) -> None:
        self.tell("end", **self.trainer.callback_metrics)

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
    """The same under FSDP2: the first layer is a group of its own, the last is the root's."""

    def configure_model(self) -> None:
        fully_shard(self.body[0])
        fully_shard(self.body)


class PlateauNet(Net):
    """Steps a ReduceLROnPlateau at each epoch's end, and it cuts the rate each time."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class OneCycleNet(Net):
    """Asks for the number of steps, and so loads the data before anything is restored."""

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
    """Gets batches of two loaders."""

    def training_step(self, batch: dict[str, list[Tensor]], batch_idx: int) -> Tensor:
        return super().training_step(
            [torch.cat(parts) for parts in zip(batch["a"], batch["b"], strict=True)], batch_idx
        )


class Rows(Logger):
    """Adds what is logged to the module's events."""

    name, version = "rows", 0

    def __init__(self, events: list[list[Any]]) -> None:
        super().__init__()
        self.events = events

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.events.append(["row", step, dict(metrics)])

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class WriteAndDie(Checkpoint):
    """Writes a file at the n-th call of a hook, as a ModelCheckpoint would, and kills the process."""

    def __init__(self, hook: str, call: int, path: Path) -> None:
        self.calls, self.call, self.path = 0, call, path
        setattr(self, hook, self._write)

    def _write(self, trainer: Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        self.calls += 1
        if self.calls == self.call:
            trainer.save_checkpoint(self.path)
            os.kill(os.getpid(), signal.SIGKILL)


def outcome(module: Any, of: Trainer) -> dict[str, Any]:
    """What two runs must have in common, bit for bit."""
    momentum = [value["momentum_buffer"] for value in of.optimizers[0].state.values()]
    tensors = [p.detach() for p in module.parameters()] + momentum
    return {"events": module.events, "tensors": [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]}


def difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first thing in which two outcomes differ; empty if they are equal."""
    for x, y in zip(a["events"], b["events"], strict=False):
        if repr(x) != repr(y):
            return f"{x} and {y}"
    if len(a["events"]) != len(b["events"]):
        return f"{len(a['events'])} and {len(b['events'])} events"
    same = all(torch.equal(x, y) for x, y in zip(a["tensors"], b["tensors"], strict=True))
    return "" if same else "weights or momentum"


def killed(run: Callable[[], None]) -> None:
    """Run it in a forked process, which must die by SIGKILL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads
        pid = os.fork()
    if pid == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def fit(
    callbacks: list[Any],
    loader: Callable[[], Any] = PositionLoader,
    path: Path | None = None,
    seed: int = 1,
    net: Callable[[], Net] = Net,
    **arguments: Any,
) -> dict[str, Any]:
    """One whole run, or the rest of one from a file."""
    seed_everything(seed, verbose=False)
    module = net()
    files = any(isinstance(callback, Checkpoint) for callback in callbacks)
    of = Trainer(
        callbacks=callbacks,
        enable_checkpointing=files,
        logger=Rows(module.events),
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        log_every_n_steps=1,
        **{"max_epochs": 3, "devices": 1, "val_check_interval": 3, **arguments},
    )
    of.fit(module, loader(), ckpt_path=path)
    return outcome(module, of)


def fit_of_two(
    strategy: str,
    hook: str | None,
    call: int,
    path: Path | None,
    resume: bool,
    exact: bool,
    loader: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """The same in a process of a living group; ``hook`` is where to write a file and die."""
    rank = torch.distributed.get_rank()

    def net() -> Net:
        module = ShardedNet() if strategy == "fsdp2" else Net()
        torch.manual_seed(100 * resume + rank)  # the ranks draw differently
        return module

    callbacks: list[Any] = [ExactResume()] if exact else []
    if hook is not None:
        callbacks.append(WriteAndDie(hook, call, path))
    return fit(
        callbacks,
        loader or (lambda: PositionLoader(seed=10 * rank)),
        path if resume else None,
        seed=2 if resume else 1,
        net=net,
        devices=2,
        val_check_interval=3 if loader is None else 1.0,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else "ddp",
        plugins=[LivingEnvironment()],
    )
