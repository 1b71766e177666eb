"""Small modules and Trainers for the tests of averaging; averages of a trajectory of weights in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from tests.harness.run import LivingEnvironment
from tests.lightning import Callback, DDPStrategy, LightningModule, ModelParallelStrategy, Strategy, Trainer


def data(count: int = 8, size: int = 4, features: int = 6, seed: int = 0) -> DataLoader:
    """Return a loader of batches whose features differ in mean."""
    generator = torch.Generator().manual_seed(seed)
    x = 3.0 * torch.randn(count * size, features, generator=generator) + torch.arange(features)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).tanh()), batch_size=size)


class Model(LightningModule):
    """A regression with ``net`` that records its weights after each step and at each validation."""

    def __init__(
        self, net: nn.Module | None = None, lr: float = 0.05, make: Callable[[], nn.Module] | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = net or (make() if make else plain_net())
        self.lr = lr
        self.trajectory: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.batches: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self.batches.append(float(batch[0].sum()))
        return mse_loss(self(batch[0]).float(), batch[1].float())

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", mse_loss(self(batch[0]).float(), batch[1].float()))

    test_step = validation_step

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trajectory.append(snapshot(self))

    def on_validation_end(self) -> None:
        self.validated.append(snapshot(self))
        self.losses.append(float(self.trainer.callback_metrics["val_loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 1))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def trainer(callbacks: Iterable[Callback] = (), **changes: Any) -> Trainer:
    arguments: dict[str, Any] = dict(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        max_epochs=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return Trainer(**(arguments | changes))


def two_processes(callbacks: Iterable[Callback], sharded: bool = True, folders: bool = True, **changes: Any) -> Trainer:
    """Return a Trainer for a process of a group of two: under FSDP2, with checkpoints in folders or files, or DDP."""
    strategy: Strategy = DDPStrategy()
    if sharded:
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=folders)
    fixed: dict[str, Any] = {"devices": 2, "plugins": [LivingEnvironment()], "use_distributed_sampler": False}
    return trainer(callbacks, strategy=strategy, **fixed, **changes)


def fit(
    model: Model, callbacks: Iterable[Callback] = (), train: Any = None, ckpt: Any = None, **changes: Any
) -> Trainer:
    fitted = trainer(callbacks, **changes)
    fitted.fit(model, data() if train is None else train, data(2, seed=1), ckpt_path=ckpt)
    return fitted


def mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of the states, in fp64."""
    return {name: sum(state[name].double() for state in states) / len(states) for name in states[0]}


def ema(states: Sequence[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """Return the exponential average of the states as a weighted sum, in fp64."""
    shares = [1.0] + [1.0 - decay] * (len(states) - 1)
    factors = [share * decay ** (len(states) - 1 - index) for index, share in enumerate(shares)]
    return {
        name: sum(factor * state[name].double() for factor, state in zip(factors, states, strict=True))
        for name in states[0]
    }


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], names: Iterable[str] | None = None) -> None:
    for name in wanted if names is None else names:
        one, other = found[name].double(), wanted[name].double()
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), f"{name}: {(one - other).abs().max()} apart"


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.allclose(one[name].double(), other[name].double(), atol=1e-4) for name in one)


class Moving(nn.Module):
    """A layer with a buffer that each training step sets to ``values(step)``."""

    def __init__(self, values: Callable[[int], Tensor | None], first: Tensor | None = None) -> None:
        super().__init__()
        self.layer, self.values = nn.Linear(6, 1), values
        self.register_buffer("moving", torch.zeros(2) if first is None else first)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.moving = self.values(int(self.count))
        return self.layer(x)
