"""The base class of callbacks: one call of the hook for each step that is really taken, and the count of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim import L2, GradientAccumulation, OptimCallback, WeightRegularization, drop_step
from tests.harness import models
from tests.harness.cells import MOMENTUM, Cell
from tests.integration.entry_fits import (
    CELL,
    FusedWithInfinity,
    KeepsHistory,
    RestartedLoader,
    assert_same,
    differences,
    fit,
    prepare,
    reference_fit,
)
from tests.lightning import Callback, LightningModule, Trainer
from tests.registry import BY_NAME


class Recording(OptimCallback):
    """Record each call of the hook: the optimizer's index, its weights and its gradients."""

    def reset(self) -> None:
        self.calls: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert not torch.is_grad_enabled()
        index = trainer.optimizers.index(optimizer)
        ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = {name: p for name, p in pl_module.named_parameters() if id(p) in ours}
        self.calls.append((index, _copied(named), _copied({name: p.grad for name, p in named.items()})))
        assert self.steps[index] == sum(i == index for i, _, _ in self.calls)


def _copied(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


class Changing:
    """Count, batch by batch, how often the weights of each optimizer change."""

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        self.before = models.full_weights(self)

    def on_train_batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        changes = vars(self).setdefault("changes", [0] * self.cell.optimizers)
        for index, net in enumerate(self.nets):
            names = {id(p): name for name, p in self.named_parameters()}
            changes[index] += any(not torch.equal(self.before[names[id(p)]], p.detach()) for p in net.parameters())


@pytest.mark.parametrize("kind", ["automatic", "manual", "two"])
@pytest.mark.parametrize("windows", ["1", "4", "4short"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("traits", [(), (FusedWithInfinity,)], ids=["plain", "fused, with an infinity"])
def test_once_for_each_step_that_was_taken(kind: Any, windows: Any, precision: Any, traits: Any) -> None:
    if precision != "16-mixed":
        traits = ()  # without a scaler an infinity is a step
    cell, recorded = Cell(kind, precision, "single", windows), Recording()
    extra = (GradientAccumulation(cell.accumulation),) if cell.accumulation > 1 else ()
    fitted = fit(BY_NAME["plain"], cell, Changing, *traits, callbacks=[recorded, *extra])
    assert recorded.steps == fitted.module.changes
    calls = fitted.trainer.global_step // cell.optimizers
    assert recorded.steps == [calls - bool(traits), calls][: cell.optimizers]
    last = {name: weight for index in range(cell.optimizers) for name, weight in _last(recorded, index).items()}
    assert not differences(last, fitted.outcome.final)


def _last(recorded: Recording, index: int) -> dict[str, Tensor]:
    return [weights for called, weights, _ in recorded.calls if called == index][-1]


@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_gradients_and_weights_are_those_of_the_step(kind: Any) -> None:
    """SGD with momentum, computed again from the recorded gradients, gives the recorded weights."""
    cell, recorded = Cell(kind, "32-true", "single", "4short"), Recording()
    callbacks = [recorded, GradientAccumulation(4), WeightRegularization(L2(0.1))]
    weights = models.full_weights(prepare(BY_NAME["plain"], cell, callbacks=callbacks).module)
    momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    fit(BY_NAME["plain"], cell, callbacks=callbacks)
    for _, seen, grads in recorded.calls:
        for name in weights:
            momentum[name] = MOMENTUM * momentum[name] + grads[name]
            weights[name] = weights[name] - cell.lr * momentum[name]
            assert torch.allclose(seen[name], weights[name], rtol=1e-6, atol=1e-7), name


class Dropping(Callback):
    """Drop the second step of each optimizer."""

    def __init__(self) -> None:
        self.calls = [0, 0]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        index = trainer.optimizers.index(optimizer)
        self.calls[index] += 1
        if self.calls[index] == 2:
            drop_step(trainer, optimizer, reason="the test says so")


@pytest.mark.parametrize("kind", ["automatic", "manual", "two"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("traits", [(), (FusedWithInfinity,)], ids=["plain", "fused"])
def test_a_dropped_step_is_not_counted(kind: Any, precision: Any, traits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedWithInfinity, "infinite", -1)
    cell, recorded, dropping = Cell(kind, precision, "single", "4short"), Recording(), Dropping()
    callbacks = [dropping, recorded, GradientAccumulation(4), WeightRegularization(L2(0.1))]
    fitted = fit(BY_NAME["plain"], cell, Changing, KeepsHistory, *traits, callbacks=callbacks)
    calls = dropping.calls[: cell.optimizers]
    assert recorded.steps == fitted.module.changes == [count - 1 for count in calls]
    assert fitted.trainer.global_step == sum(calls), "Lightning counts calls"


class ReturningNone:
    """Return ``None`` from the training step at some batches."""

    at: tuple[int, ...] = ()

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        return None if batch_idx in self.at else loss


@pytest.mark.parametrize(("at", "steps"), [((1,), 6), ((1, 3), 4), ((0, 1, 2, 3), 0)])
def test_training_step_that_returns_none(at: tuple[int, ...], steps: int) -> None:
    """Such a batch leads to no step, also with a penalty."""
    cell, recorded = Cell("automatic", "32-true", "single", "1"), Recording()
    trait = type("ReturningNone", (ReturningNone,), {"at": at})
    fitted = fit(BY_NAME["plain"], cell, Changing, trait, callbacks=[recorded, WeightRegularization(L2(0.1))])
    assert recorded.steps == fitted.module.changes == [steps]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize(("at", "steps"), [((1,), 4), ((3,), 4), ((0, 1, 2, 3), 2), ((4, 5), 2)])
def test_a_window_with_batches_that_return_none(at: tuple[int, ...], steps: int, precision: Any) -> None:
    if precision == "16-mixed" and 3 in at:
        steps = 2  # With a scaler Lightning takes no step at a batch that returns nothing, whatever the window holds.
    cell, recorded = Cell("automatic", precision, "single", "4short"), Recording()
    trait = type("ReturningNone", (ReturningNone,), {"at": at})
    callbacks = [recorded, GradientAccumulation(4), WeightRegularization(L2(0.1))]
    fitted = fit(BY_NAME["plain"], cell, Changing, trait, callbacks=callbacks)
    assert recorded.steps == fitted.module.changes == [steps]


class Leaving:
    """End the first epoch just before one of its batches."""

    at = 0

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> Any:
        return -1 if (self.trainer.current_epoch, batch_idx) == (0, self.at) else None


def test_a_window_that_never_closed_is_forgotten() -> None:
    """Lightning zeroes its gradients when the next window begins, whose mean is over its own micro-batches alone."""

    def weights(at: int) -> dict[str, Tensor]:
        leaving = type("Leaving", (Leaving, RestartedLoader), {"at": at})
        cell = Cell("automatic", "32-true", "single", "4short")
        fitted = fit(BY_NAME["plain"], cell, leaving, callbacks=[GradientAccumulation(4)], limit_val_batches=0)
        assert fitted.ours[0].steps == [2]
        return fitted.outcome.final

    assert not differences(weights(3), weights(0))


@pytest.mark.parametrize("kind", ["automatic", "manual", "two"])
def test_a_callback_that_is_new_on_resume_gets_the_step_count_of_the_run(kind: Any, tmp_path: Path) -> None:
    """From another callback of this package, which knows of a dropped step; else from Lightning's count of calls."""
    cell = Cell(kind, "32-true", "single", "4short")
    windows, old = GradientAccumulation(4), OptimCallback(name="old")
    first = fit(BY_NAME["plain"], cell, callbacks=[Dropping(), old, windows], max_epochs=1)
    first.trainer.save_checkpoint(tmp_path / "of ours.ckpt")
    calls, happened = first.trainer.global_step // cell.optimizers, list(old.steps)
    assert happened == [calls - 1] * cell.optimizers
    saved = torch.load(tmp_path / "of ours.ckpt", weights_only=False)
    torch.save({**saved, "callbacks": {}}, tmp_path / "of none.ckpt")

    for path, known in (("of ours.ckpt", happened), ("of none.ckpt", [calls] * cell.optimizers)):
        starts: list[list[int]] = []

        class New(OptimCallback):
            def on_train_start(self, *_: Any) -> None:
                starts.append(list(self.steps))  # noqa: B023

        callbacks = [New(), OptimCallback(name="old"), GradientAccumulation(4)]
        resumed = fit(BY_NAME["plain"], cell, callbacks=callbacks, max_epochs=2, ckpt_path=tmp_path / path)
        assert starts == [known]
        assert all(callback.steps == [step + calls for step in known] for callback in resumed.ours)


def test_recording_changes_nothing() -> None:
    callbacks = [Recording(), *BY_NAME["several"].all_callbacks(CELL)]
    assert_same(fit(BY_NAME["several"], CELL, KeepsHistory, callbacks=callbacks), reference_fit(BY_NAME["several"]))
