"""Test that a run that goes back to a captured state goes on from there bit for bit, with the next batches."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_optim import (
    EMA,
    AutoClip,
    GradientAccumulation,
    GradientClipping,
    ManualOptimizationMixin,
    WeightAveraging,
)
from lightning_optim.runtime.capture import capture, restore_
from tests.harness.process_group import Group
from tests.harness.run import LivingEnvironment, share_mesh
from tests.lightning import (
    BoringModel,
    Callback,
    DDPStrategy,
    LightningModule,
    MixedPrecision,
    ModelParallelStrategy,
    Trainer,
)

BATCHES = 16
CAPTURED, RESTORED = 5, 11  # the batches at whose end; each ends a window of two
BETWEEN = range(CAPTURED + 1, RESTORED + 1)


class Net(ManualOptimizationMixin, LightningModule):
    """Draws in each step from torch, Python and NumPy; has buffers that no checkpoint holds and a plain attribute."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.automatic_optimization = kind == "automatic"
        self.nets = nn.ModuleList([self._net() for _ in range(1 + (kind == "two optimizers"))])
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.register_buffer("recent", None, persistent=False)
        self.temperature, self.mean = 1.0, MeanMetric()

    @staticmethod
    def _net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def loss(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        error = (net(batch[0]).squeeze(1) - batch[1]).square().mean()
        return (
            error * float(self.scale) * self.temperature * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        losses = [self.loss(net, batch) for net in self.nets]
        self.recent = torch.stack([*([] if self.recent is None else self.recent[-3:]), losses[0].detach()])
        self.scale.lerp_(1 / (1 + self.recent.mean()), 0.1)
        self.temperature *= 0.98
        self.mean.update(losses[0].detach())
        self.log("loss", losses[0].detach(), on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        if self.automatic_optimization:
            return losses[0]
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        listed = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer, loss in zip(listed, losses, strict=True):
            self.optimize(loss, optimizer)
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()
        return None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(self.nets[0], batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.AdamW(net.parameters(), 0.01) for net in self.nets]
        schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20) for optimizer in optimizers]
        return optimizers, [{"scheduler": scheduler, "interval": "step"} for scheduler in schedulers]

    def train_dataloader(self) -> Batches:
        return Batches(self)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([(torch.ones(6, 4), torch.ones(6))], batch_size=None)  # type: ignore[arg-type]

    left_out: tuple[range, ...] = (range(0),)  # batches of each epoch


class Batches:
    """Gives this rank's batches that the running epoch does not leave out, and draws no random number of the run."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(BATCHES):
            if index not in self.net.left_out[self.net.current_epoch]:
                seed = 2 * index + self.net.global_rank
                batch = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
                yield batch[:, :4], batch[:, 4]


class ShardedNet(Net):
    def configure_model(self) -> None:
        for net in self.nets:
            if not isinstance(net, FSDPModule):
                fully_shard(net[0])
                fully_shard(net)


class Steps(Callback):
    """Count batches, in the ``state_dict`` alone."""

    count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": torch.tensor(self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = int(state["count"])


class GoBack(Callback):
    """Captures and restores at the ends of batches, and looks at the run before and after it restores."""

    def __init__(
        self, captured: int = CAPTURED, restored: tuple[int, ...] = (RESTORED,), look: Callable[..., Any] = lambda _: 0
    ) -> None:
        self.captured, self.restored, self.look = captured, restored, look
        self.found: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.captured:
            self.state = capture(trainer)
        if batch_idx in self.restored:
            self.found.append(self.look(trainer))
            assert restore_(trainer, self.state) == []
            self.found.append(self.look(trainer))


def run(
    kind: str = "automatic",
    precision: str = "32-true",
    strategy: str = "auto",
    more: tuple[Callback, ...] = (),
    left_out: tuple[range, ...] = (range(0),),
) -> dict[str, Any]:
    """Train, and return everything that the fit ended with."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    net = (ShardedNet if strategy == "fsdp2" else Net)(kind)
    net.left_out = left_out
    plugins: list[Any] = [] if strategy == "auto" else [LivingEnvironment()]
    if precision == "16-mixed":  # the first steps overflow, and the scale grows again every three steps
        plugins.append(MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**18, growth_interval=3)))
    strategies = {"ddp": lambda: DDPStrategy(find_unused_parameters=True), "fsdp2": lambda: ModelParallelStrategy(2, 1)}
    if strategy == "fsdp2":
        share_mesh()
    average, clipping = WeightAveraging(EMA(0.9), start=1), GradientClipping(AutoClip(0.5, history=4))
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=strategies[strategy]() if strategy in strategies else "auto",
        plugins=plugins,
        precision=None if precision == "16-mixed" else precision,  # type: ignore[arg-type]
        callbacks=[GradientAccumulation(2), clipping, average, Steps(), *more],
        max_epochs=len(left_out),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ended = Ended()
    trainer.callbacks.append(ended)
    trainer.fit(net)
    return ended.outcome


class Ended(Callback):
    """Looks at everything before the fit puts the average into the module."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        average = next(callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging))
        clipping = next(callback for callback in trainer.callbacks if isinstance(callback, GradientClipping))
        steps = next(callback for callback in trainer.callbacks if isinstance(callback, Steps))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.outcome = plain(
            {
                "weights": dict(pl_module.named_parameters()),
                "buffers": dict(pl_module.named_buffers()),
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "scaler": {} if scaler is None else scaler.state_dict(),
                "average": average.averaged_state(),
                "clipping": clipping.extra_state(),
                "counts": [average.steps, clipping.steps, steps.count, trainer.global_step],
                "logged": dict(trainer.callback_metrics),
                "attribute": pl_module.temperature,
                "draws": [torch.rand(3), random.random(), np.random.rand()],
            }
        )


def plain(tree: Any) -> Any:
    """Return nested lists of numbers, which can be sent to another process and compared bit for bit."""
    if isinstance(tree, dict):
        return {str(name): plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, Tensor):
        tree = tree.detach()
        return (tree.to_local() if isinstance(tree, DTensor) else tree).tolist()
    return tree if isinstance(tree, bool | int | float | str | None) else str(type(tree))


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the parts in which two outcomes differ; a NaN is equal to a NaN."""
    return [part for part in one if repr(one[part]) != repr(other[part])]


def compare(kind: str, precision: str, strategy: str) -> tuple[list[str], list[str]]:
    """Job: compare a run that went back with one without the batches between, and with one with all batches."""
    without = run(kind, precision, strategy, left_out=(BETWEEN,))
    back = run(kind, precision, strategy, (GoBack(),))
    return differing(back, without), differing(back, run(kind, precision, strategy))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("kind", ["automatic", "manual", "two optimizers"])
def test_goes_on_as_from_the_captured_state(kind: str, precision: str) -> None:
    same, other = compare(kind, precision, "auto")
    assert same == []
    assert set(other) >= {"weights", "buffers", "optimizers", "schedulers", "average", "clipping", "counts", "logged"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["automatic", "two optimizers"])
def test_two_processes(kind: str, strategy: str, group: Group) -> None:
    for same, other in group.run(compare, kind, "32-true", strategy):
        assert same == []
        assert set(other) >= {"weights", "buffers", "optimizers", "average", "clipping"}


def test_before_the_first_step() -> None:
    """Nothing is in the optimizers then, and no average has started."""
    left_out = (range(RESTORED + 1),)
    assert differing(run(more=(GoBackToTheStart(captured=-1),)), run(left_out=left_out)) == []


class GoBackToTheStart(GoBack):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.state = capture(trainer)


def test_the_same_state_again_and_again() -> None:
    """Values that were put back are not those of the state: the run writes to them."""
    back = run(more=(GoBack(restored=(7, 9, RESTORED)),))
    assert differing(back, run(left_out=(BETWEEN,))) == []


class NextEpoch(GoBack):
    """Goes back from the fourth batch of the second epoch to a batch of the first one."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (0, CAPTURED):
            self.state = capture(trainer)
        if (trainer.current_epoch, batch_idx) == (1, 3):
            restore_(trainer, self.state)


def test_from_one_epoch_to_the_one_before() -> None:
    """Means of the second epoch are then over the batches that come."""
    back = run(more=(NextEpoch(), NoValidation()), left_out=(range(0), range(0)))
    left_out = (range(CAPTURED + 1, BATCHES), range(4))
    assert differing(back, run(more=(NoValidation(),), left_out=left_out)) == []


class NoValidation(Callback):
    """Leaves out validations: they draw random numbers, which go back with the state."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        trainer.limit_val_batches = 0


def where(trainer: Trainer) -> list[Any]:
    """Return the identity and the address of each tensor."""
    module = trainer.lightning_module
    tensors = [*module.parameters(), *(buffer for name, buffer in module.named_buffers() if name != "recent")]
    tensors += [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    return [(id(tensor), tensor.data_ptr()) for tensor in tensors]


def test_in_place() -> None:
    back = GoBack(look=where)
    run(more=(back,))
    before, after = back.found
    assert before == after and len(before) > 20


class Failing(Callback):
    """Raise when the state is loaded for the first time."""

    loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {"loads": self.loads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loads += 1
        if self.loads == 1:
            raise KeyError("as planned")


class TriesToGoBack(GoBack):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if args[-1] == RESTORED:
            with pytest.raises(KeyError, match="as planned"):
                restore_(trainer, self.state)
        else:
            super().on_train_batch_end(trainer, *args)


def test_all_or_nothing() -> None:
    assert differing(run(more=(Failing(), TriesToGoBack())), run()) == []


class Chosen(GoBack):
    """Leaves a callback out."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == CAPTURED:
            self.state = capture(trainer, "cpu", [cb for cb in trainer.callbacks if not isinstance(cb, Steps)])
        if batch_idx == RESTORED:
            restore_(trainer, self.state)


def test_only_the_chosen_callbacks_go_back() -> None:
    without = run(left_out=(BETWEEN,))
    chosen = run(more=(Chosen(),))
    assert differing(chosen, without) == ["counts"] and chosen["counts"][2] == BATCHES


class Asks(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._ask)

    def _ask(self, trainer: Trainer, *_: Any) -> None:
        capture(trainer)


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_validation_end"])
def test_refuses_other_moments(hook: str) -> None:
    with pytest.raises(RuntimeError, match="between two steps of a fit: call it in `on_train_batch_start`"):
        run(more=(Asks(hook),))


class WhereWindowsAreOpen(Callback):
    def __init__(self) -> None:
        self.at_starts: list[int] = []
        self.at_ends: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._try(trainer, batch_idx, self.at_starts)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._try(trainer, batch_idx, self.at_ends)

    def _try(self, trainer: Trainer, batch_idx: int, refused: list[int]) -> None:
        try:
            capture(trainer)
        except RuntimeError as error:
            assert "while an accumulation window is open" in str(error)
            refused.append(batch_idx)


@pytest.mark.parametrize("ours", [True, False])
def test_refuses_open_windows(ours: bool) -> None:
    """The last window of the epoch has one batch."""
    asks = WhereWindowsAreOpen()
    trainer = Trainer(
        callbacks=[*([GradientAccumulation(3)] if ours else []), asks],
        accumulate_grad_batches=1 if ours else 3,
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=7,
        barebones=True,
    )
    trainer.fit(BoringModel())
    assert asks.at_starts == [1, 2, 4, 5] and asks.at_ends == [0, 1, 3, 4]


def test_refuses_a_trainer_that_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match="between two steps of a fit"):
        capture(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))


class Momentum(BoringModel):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Between(Callback):
    """Capture after the second batch, change something after the third, and restore after the fourth."""

    def __init__(self, change: Callable[[Trainer], Any] = lambda trainer: None) -> None:
        self.change, self.states, self.seen = change, [], []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and not self.states:
            self.states = [capture(trainer)]
        if batch_idx == 2:
            self.change(trainer)
        if batch_idx == 3:
            restore_(trainer, self.states[0])
        if batch_idx in (1, 3):
            momentum = [trainer.optimizers[0].state[p]["momentum_buffer"].clone() for p in pl_module.parameters()]
            self.seen.append([*(p.detach().clone() for p in pl_module.parameters()), *momentum])


def fit(*callbacks: Callback, module: BoringModel | None = None) -> Trainer:
    trainer = Trainer(callbacks=list(callbacks), accelerator="cpu", max_epochs=1, limit_train_batches=5, barebones=True)
    trainer.fit(module or Momentum())
    return trainer


def test_goes_back_also_if_the_state_of_an_optimizer_was_loaded_since() -> None:
    """Then the optimizer holds new tensors, in a new dictionary."""

    def load(trainer: Trainer) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    between = Between(load)
    assert fit(between).global_step == 3
    assert all(map(torch.equal, *between.seen))


def replace_optimizer(trainer: Trainer) -> None:
    trainer.strategy.optimizers = [torch.optim.SGD(trainer.lightning_module.parameters(), lr=0.1, momentum=0.9)]


def test_refuses_a_state_from_before_an_optimizer_was_replaced() -> None:
    with pytest.raises(RuntimeError, match="before an optimizer or a learning-rate scheduler was replaced"):
        fit(Between(replace_optimizer))


def test_refuses_while_the_module_holds_an_average() -> None:
    average = WeightAveraging(EMA(0.9))

    def within(trainer: Trainer) -> None:
        with average.averaged_weights(trainer.lightning_module):
            capture(trainer)

    with pytest.raises(RuntimeError, match="while the module holds averaged weights"):
        fit(Between(within), average)


@pytest.mark.parametrize("same_module", [True, False])
def test_refuses_the_state_of_another_fit(same_module: bool) -> None:
    module, first, second = Momentum(), Between(), Between()
    fit(first, module=module)
    second.states = first.states
    with pytest.raises(RuntimeError, match="captured in another fit"):
        fit(second, module=module if same_module else Momentum())


def test_refuses_after_an_exception() -> None:
    class Failing(Between):
        def on_exception(self, trainer: Trainer, *_: Any) -> None:
            with pytest.raises(RuntimeError, match="between two steps of a fit"):
                restore_(trainer, self.states[0])
            self.refused = True

    failing = Failing(lambda trainer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(failing)
    assert failing.refused
