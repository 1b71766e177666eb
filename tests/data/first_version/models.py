"""A network of thirty numbers on a small regression, as modules that have one trait or another.

Nothing here may change: the files were written with it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, mse_loss
from torch.optim import SGD

from lightning_optim import ManualOptimizationMixin, RegularizationMixin, SharpnessAwareMixin
from tests.lightning import LightningModule

FEATURES, HIDDEN, TARGETS = 4, 3, 2
BATCHES = 6  # in an epoch
VALIDATE_EVERY = 3
NOTHING = 1  # The micro-batch that makes no loss and no step, so that steps are not what Lightning counts.

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Two layers, and if wanted BatchNorm between them; a bias before it would have no gradient but for rounding."""

    def __init__(self, features: int, seed: int, norm: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(features, HIDDEN, bias=not norm)
        self.norm = nn.BatchNorm1d(HIDDEN) if norm else nn.Identity()
        self.outer = nn.Linear(HIDDEN, TARGETS)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.inner, self.outer):
                for parameter in layer.parameters():
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(gelu(self.norm(self.inner(x)), approximate="tanh"))


def make_batches(count: int, seed: int, sizes: Sequence[int] = (6,)) -> list[Batch]:
    """Batches of a fixed regression with noise, of these sizes in turn."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(FEATURES, TARGETS, generator=torch.Generator().manual_seed(0))
    batches = []
    for index in range(count):
        size = sizes[index % len(sizes)]
        x = torch.randn(size, FEATURES, generator=generator)
        batches.append((x, torch.tanh(x @ mix) + 0.3 * torch.randn(size, TARGETS, generator=generator)))
    return batches


class Loader:
    """Loader that saves its position and, if it shuffles with a generator of its own, its epoch."""

    def __init__(self, batches: list[Batch], shuffles: bool = False) -> None:
        self.batches, self.shuffles = batches, shuffles
        self.epoch = self.position = 0
        self.loaded = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        if self.loaded:
            self.loaded = False
        else:
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.arange(len(self))
        if self.shuffles:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch))
        for index in order[self.position :].tolist():
            self.position += 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self.loaded = state["epoch"], state["position"], True


class Model(LightningModule):
    """One network under automatic optimization.

    Args:
        scores: Metrics that validation logs: name to values, one for each validation in their order.
        faults: Number of a micro-batch to a factor for its loss.
        norm: Whether there is BatchNorm.
        groups: Whether the optimizer has two parameter groups, weights and biases.
        sizes: The sizes of the batches, in turn.
    """

    optimizer_count = 1

    def __init__(
        self,
        scores: Mapping[str, Sequence[float]] | None = None,
        faults: Mapping[int, float] | None = None,
        norm: bool = False,
        groups: bool = False,
        sizes: Sequence[int] = (6,),
    ) -> None:
        super().__init__()
        self.scores, self.faults = dict(scores or {}), dict(faults or {})
        self.groups, self.sizes = groups, sizes
        self.net = Net(FEATURES, 1, norm)
        if self.optimizer_count == 2:
            self.second = Net(FEATURES + TARGETS, 2, norm)
        self.seen = 0
        self.validations: list[dict[str, float]] = []
        self.raw: dict[str, Tensor] = {}

    @property
    def nets(self) -> list[nn.Module]:
        return [self.net, self.second] if self.optimizer_count == 2 else [self.net]

    def losses(self, batch: Batch) -> list[Tensor]:
        """One for each network; the second reaches into the first, as a generator's does into a discriminator."""
        x, y = batch
        first = self.net(x)
        if self.optimizer_count == 1:
            return [mse_loss(first, y)]
        return [mse_loss(first, y), mse_loss(self.second(torch.cat([x, first], 1)), y.flip(1))]

    def factor(self) -> float:
        """Return the factor of the loss of the next micro-batch, 0 without a loss, and count the micro-batch."""
        self.seen += 1
        return 0.0 if self.seen - 1 == NOTHING else self.faults.get(self.seen - 1, 1.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        factor = self.factor()
        return self.losses(batch)[0] * factor if factor else None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", sum(self.losses(batch)))

    def on_validation_epoch_end(self) -> None:
        for name, values in self.scores.items():
            self.log(name, values[len(self.validations)])

    def on_validation_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.validations.append({name: float(value) for name, value in metrics.items() if name.startswith("val_")})

    def on_train_end(self) -> None:
        self.raw = weights_of(self)

    def configure_optimizers(self) -> Any:
        return [SGD(self.grouped(net) if self.groups else net.parameters(), 0.005, 0.9) for net in self.nets]

    def grouped(self, net: nn.Module) -> list[dict[str, Any]]:
        matrices, vectors = ([p for p in net.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
        return [{"params": matrices}, {"params": vectors, "lr": 0.01}]

    def train_dataloader(self) -> Loader:
        return Loader(make_batches(BATCHES, 10, self.sizes))

    def val_dataloader(self) -> Loader:
        return Loader(make_batches(1, 20, (16,)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["so_far"] = {"seen": self.seen, "validations": [dict(values) for values in self.validations]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint["so_far"]["seen"]
        self.validations = [dict(values) for values in checkpoint["so_far"]["validations"]]


class ManualModel(ManualOptimizationMixin, Model):
    """The same under manual optimization."""

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        factor, optimizers = self.factor(), self.optimizers()
        if not factor:
            return
        for index, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
            self.optimize(self.losses(batch)[index] * factor, optimizer)


class TwoModel(ManualModel):
    """Two networks, each with an optimizer that steps in every window."""

    optimizer_count = 2


class FrozenModel(Model):
    """Module with frozen weights, which its checkpoints leave out."""

    strict_loading = False

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self.net.inner.weight.requires_grad_(False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"].pop("net.inner.weight", None)


class RandomModel(Model):
    """Draws from every generator, shuffles, averages over an epoch, and has a buffer that is in no ``state_dict``."""

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self.register_buffer("drift", torch.zeros(FEATURES), persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        x, y = batch
        self.drift += 0.01 * (x.mean(0) + torch.randn(FEATURES))
        loss = super().training_step((x + self.drift, y), batch_idx)
        if loss is None:
            return None
        self.log("mean_loss", loss.detach(), on_step=False, on_epoch=True)
        return loss * (1.0 + random.random() + float(np.random.rand()))

    def train_dataloader(self) -> Loader:
        return Loader(make_batches(BATCHES, 10, self.sizes), shuffles=True)


class SharpModel(SharpnessAwareMixin, Model):
    """Steps with the gradient at the worst point nearby."""

    def __init__(self, **traits: Any) -> None:
        super().__init__(rho=0.2, adaptive=True, **traits)

    def factor(self) -> float:
        self.seen -= int(self.second_pass)
        return super().factor()


class RegularizedModel(RegularizationMixin, Model):
    """Module with a penalty on the outputs in its loss."""

    def regularization(self, batch: Batch, outputs: Tensor) -> Tensor:
        return 0.5 * outputs.abs().mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if loss is None else loss + self.regularization_loss(batch, self.net(batch[0]))


class Member(LightningModule):
    """A classifier in an ensemble, with a hyper-parameter, and something of its own in its checkpoints."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(FEATURES, seed)
        self.added = ""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.hparams["scale"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", mse_loss(self(batch[0]), batch[1]))

    def val_dataloader(self) -> Loader:
        return Loader(make_batches(1, 20, (16,)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["added"] = f"of {self.hparams['seed']}"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.added = checkpoint["added"]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and persistent buffers."""
    return {name: value.detach().clone() for name, value in nn.Module.state_dict(module).items()}
