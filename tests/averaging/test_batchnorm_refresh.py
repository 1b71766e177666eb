"""Statistics of averaged weights come from the module's training step, and leave no trace in the run."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection

from lightning_optim import LAWA, SWA, WeightAveraging, refresh_batchnorm_
from tests.averaging.models import Model, assert_close, assert_equal, data, norm_net, snapshot, trainer
from tests.lightning import Callback, CombinedLoader, Logger


def _named(name: str) -> DataLoader:
    return DataLoader([{name: x, "y": y} for x, y in data()], batch_size=None)


class Plain(Model):
    """A model whose first BatchNorm layer gets the input, so that its statistics are known."""

    def __init__(self) -> None:
        super().__init__(make=norm_net)

    def train_dataloader(self) -> Any:
        return data()

    def val_dataloader(self) -> Any:
        return data(1)

    def validation_step(self, batch, batch_idx) -> None:
        pass

    def on_train_batch_end(self, *args: Any) -> None:
        pass

    def on_validation_end(self) -> None:
        pass

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(self.net(x), y)

    def rest(self) -> Any:
        """Return whatever else the step changes, to compare it."""


# ---- ways to get from a batch to a loss ----


class Everything(Plain):
    def train_dataloader(self):
        return _named("past")

    def forward(self, *args, **kwargs):
        return self.net(kwargs["past"])

    def training_step(self, batch):
        return {"loss": mse_loss(self(**batch), batch["y"]), "more": 1}


class TwoInputs(Plain):
    def forward(self, x, z):
        return self.net(x + 0.0 * z)

    def training_step(self, batch, batch_idx):
        return mse_loss(self(batch[0], batch[0]), batch[1])


class BuiltInTheStep(Plain):
    def train_dataloader(self):
        return _named("temporal")

    def training_step(self, batch, *args):
        x = batch.pop("temporal")  # the batch is the loader's own: it would lack this in the next epoch
        self.trainer.train_dataloader.dataset[args[0] % 8]["temporal"] = x
        return self.loss(x, batch["y"])


class WritesToTheBatch(Plain):
    """A model that writes to the batch, which is a tensor of the dataset."""

    def train_dataloader(self):
        return _named("x")

    def training_step(self, batch, batch_idx):
        return self.loss(batch["x"].mul_(1.1), batch["y"])


class SeveralLoaders(Plain):
    def train_dataloader(self):
        return CombinedLoader({"few": data(2, seed=5), "many": [data(8, seed=0), data(8, seed=0)]}, "max_size_cycle")

    def training_step(self, batch, batch_idx):
        assert batch["few"][0].shape == batch["many"][1][0].shape
        return self.loss(*batch["many"][1]) + 0.0 * batch["few"][0].sum()


class Physics(Plain):
    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return mse_loss(u, batch[1]) + slope.square().mean()


class PenaltyAtTimes(Plain):
    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        if batch_idx % 3 == 2:
            grads = torch.autograd.grad(loss, [self.net[0].weight], create_graph=True)
            loss = loss + grads[0].square().sum()
        return loss


class SkipsAtTimes(Plain):
    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        return None if batch_idx == 0 else loss


class AsksTheTrainer(Plain):
    def training_step(self, batch, batch_idx):
        assert self.trainer.training and self.trainer.state.stage == "train"
        assert isinstance(self.optimizers().param_groups, list) and self.lr_schedulers() is None
        self.trainer.should_stop = not self.training
        return self.loss(*batch) * (1.0 + 0.1 * self.global_step + self.current_epoch)


KINDS: list[type[Plain]] = [Everything, TwoInputs, BuiltInTheStep, SeveralLoaders, Physics, PenaltyAtTimes]
KINDS += [SkipsAtTimes, AsksTheTrainer]


# ---- things that a step changes ----


class Momentum(Plain):
    """A model with a momentum encoder and a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.key = norm_net().requires_grad_(False)
        self.register_buffer("queue", torch.zeros(16, 1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.register_buffer("grown", torch.zeros(0, dtype=torch.long))

    @torch.no_grad()
    def _advance(self, keys: Tensor) -> None:
        for query, key in zip(self.net.parameters(), self.key.parameters(), strict=True):
            key.data = key.data * 0.9 + query.data * 0.1
        place = int(self.place)
        self.queue[place : place + 4] = keys
        self.place[...] = (place + 4) % 16
        self.grown = torch.cat([self.grown, self.place[None]])

    def training_step(self, batch, batch_idx):
        self._advance(self.key(batch[0]))
        out = self.net(batch[0])
        return mse_loss(out, batch[1]) + (out - self.queue.mean()).square().mean()


@dataclass
class Meter:
    total: float = 0.0
    seen: list[float] = field(default_factory=list)


class Attributes(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.outputs, self.by_name, self.last = 0, [], {"a": {"n": 0}}, deque(maxlen=3)
        self.table, self.ids, self.meter, self.helper = numpy.zeros(4), set(), Meter(), threading.local
        self.plain = torch.zeros(2)
        self.net[0].calls = 0
        self.generator = torch.Generator().manual_seed(3)
        self.draws, self.legacy, self.python = (
            numpy.random.default_rng(3),
            numpy.random.RandomState(3),
            random.Random(3),
        )

    def on_train_epoch_start(self) -> None:
        self.this_epoch = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        self.count += 1
        self.outputs.append(loss)
        self.this_epoch.append(float(loss))
        self.by_name["a"]["n"] += 1
        self.by_name[f"batch {self.count}"] = loss.detach()
        self.last.append(self.count)
        self.table[self.count % 4] += float(loss)
        self.ids.add(self.count)
        self.meter.total += float(loss)
        self.meter.seen.append(self.count)
        self.plain += 1.0
        self.net[0].calls += 1
        self.newest = self.count
        noise = torch.rand((), generator=self.generator) + self.draws.random() + self.python.random()
        return loss * float(1.0 + noise + self.legacy.rand() + random.random() + numpy.random.rand() + torch.rand(()))

    def rest(self):
        plain = (self.count, self.by_name["a"], list(self.last), self.table.tolist(), sorted(self.ids), self.newest)
        more = (self.meter, len(self.this_epoch), self.net[0].calls, self.plain.tolist(), len(self.by_name))
        return *plain, *more, [float(loss) for loss in self.outputs], self.this_epoch


class Metrics(Plain):
    """A model with metrics, one of them not a submodule, that it logs at the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.both = MeanMetric(), MetricCollection({"one": MeanMetric(), "other": MeanMetric()})
        self.hidden = {"mean": MeanMetric()}
        self.logged: list[dict[str, float]] = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        self.mean(loss)
        self.both.update(loss.detach())
        self.hidden["mean"].update(loss.detach())
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict(self.both, on_epoch=True)
        self.log("loss", loss, on_epoch=True, prog_bar=True)
        super().log("past the mute", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.logged.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def rest(self):
        return self.logged, float(self.mean.compute()), float(self.hidden["mean"].compute()), self.mean._update_count


class Modes(Plain):
    """A model that changes gradients, modes and trainable parameters in its step, with a hyper-network."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper, self.made = nn.Linear(1, 1), {}

    def training_step(self, batch, batch_idx):
        self.net[0].bias.requires_grad_(False)
        self.net.eval()
        self.weight = self.hyper(torch.ones(1))
        self.made["weight"] = self.weight
        self.net.train()
        self.hyper.weight.square().sum().backward()
        return self.loss(*batch) * (1.0 + self.weight.sum())

    def rest(self):
        return float(self.weight), [p.requires_grad for p in self.parameters()], [m.training for m in self.modules()]


class Recorder(Logger):
    """A logger that users call directly."""

    name, version, save_dir = "recorder", "1", "/nowhere"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    @property
    def experiment(self) -> Recorder:
        self.seen.append("run")
        return self

    def add_scalar(self, *what: Any) -> None:
        self.seen.append(what)

    def log_metrics(self, metrics, step=None) -> None:
        self.seen.append((metrics, step))

    def log_hyperparams(self, params) -> None:
        pass


class Loggers(Plain):
    printed: list[Any]

    def __init__(self) -> None:
        super().__init__()
        self.printed = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        assert isinstance(self.logger, Recorder) and self.logger.save_dir == "/nowhere"
        self.logger.experiment.add_scalar("loss", float(loss))
        self.loggers[0].log_metrics({"direct": float(loss)}, step=self.global_step)
        self.print(float(loss))
        self.log("loss", loss)
        return loss

    def rest(self):
        return self.logger.seen


CHANGES: list[type[Plain]] = [Momentum, Attributes, Metrics, Modes, Loggers]


# ---- the tests ----


class Trace(Callback):
    """Record weights, gradients, random state and the model's ``rest`` after each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.rest: list[str] = []

    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
        grads = {f"{name}.grad": p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        draws = {"random": torch.get_rng_state(), "numpy": torch.tensor(numpy.random.get_state()[1].astype("int64"))}
        python = {"python": torch.tensor(random.getstate()[1])}
        self.states.append({**snapshot(pl_module), **grads, **draws, **python})
        self.rest.append(repr(pl_module.rest()))


def _run(kind: Callable[[], Plain], average: WeightAveraging, **changes: Any) -> tuple[Plain, Trace]:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    model, trace = kind(), Trace()
    logger = Recorder() if isinstance(model, Loggers) else False
    trainer([trace, average], logger=logger, val_check_interval=3, **changes).fit(model)
    return model, trace


@pytest.mark.parametrize("kind", KINDS + CHANGES)
@pytest.mark.parametrize("average", [SWA(), LAWA(3)], ids=["SWA", "LAWA"])
def test_statistics_are_those_of_the_averaged_weights(kind: type[Plain], average: Any) -> None:
    model, _ = _run(kind, WeightAveraging(average))
    wanted = norm_net()
    wanted.load_state_dict(model.net.state_dict())
    refresh_batchnorm_(wanted, [x for x, _ in data()])
    assert_close(snapshot(model.net), snapshot(wanted))


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", [*KINDS, *CHANGES, WritesToTheBatch])
def test_the_run_is_that_without_a_refresh(kind: type[Plain], accumulate: int) -> None:
    _, refreshed = _run(kind, WeightAveraging(SWA()), accumulate_grad_batches=accumulate)
    _, copied = _run(kind, WeightAveraging(SWA(), buffers="copy"), accumulate_grad_batches=accumulate)
    assert len(refreshed.states) == 16
    for one, other in zip(refreshed.states, copied.states, strict=True):
        assert_equal(one, other)
    assert refreshed.rest == copied.rest
