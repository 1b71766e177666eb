"""Fit an entry of the registry and look into it: the fit, modules with one more trait, and comparisons bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_optim import OptimCallback
from lightning_optim.resume.exact_resume import ExactResume
from tests.harness import models, regression, run
from tests.harness.cells import MOMENTUM, Cell
from tests.harness.models import Batch, Model
from tests.harness.reference_loop import Outcome
from tests.lightning import Callback, LightningModule, Trainer, supported
from tests.registry import ENTRIES, Entry

CELL = Cell("automatic", "32-true", "single", "4short")
"""One process, windows of four micro-batches and a last one of two. An epoch has two validations: one within the first
window and one at the end."""

# Without the criteria, which see no tensor of the model: tests/stopping tests their state and how they resume.
TENSOR_ENTRIES = tuple(entry for entry in ENTRIES if entry.cells != "strategies")
SLOT_ENTRIES = tuple(entry for entry in ENTRIES if entry.cells == "all" or entry.name == "several")


def _each(entries: Sequence[Entry]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


each_entry = _each(TENSOR_ENTRIES)
each_slot = _each(SLOT_ENTRIES)  # for behaviour that depends on the base class alone


def each_entry_by(argument: str, first: Any, *others: Any) -> pytest.MarkDecorator:
    """Run a test for every entry with the first value of an argument, and for one entry of each slot with the others.

    The others are for behaviour that depends on the base class alone.
    """
    pairs = [(entry, first) for entry in TENSOR_ENTRIES] + [
        (entry, value) for entry in SLOT_ENTRIES for value in others
    ]
    names = [f"{entry.name}-{getattr(value, '__name__', value)}" for entry, value in pairs]
    return pytest.mark.parametrize(("entry", argument), pairs, ids=names)


each_kind = pytest.mark.parametrize("kind", ["automatic", "manual", "two"])


class TestsAndPredicts(LightningModule):
    """Trait: test and predict on the validation data."""

    def test_step(self: Any, batch: Batch, batch_idx: int) -> None:
        losses = [regression.loss_of(index, self.nets, batch) for index in range(self.cell.optimizers)]
        self.log("test_loss", torch.stack(losses).sum())

    def predict_step(self: Any, batch: Batch, batch_idx: int) -> Tensor:
        return self.nets[0](batch[0])

    def test_dataloader(self: Any) -> Any:
        return self.val_dataloader()

    def predict_dataloader(self: Any) -> Any:
        return self.val_dataloader()


class RestartedLoader(LightningModule):
    """Trait: a training loader without a saved position, so that each new iterator begins with the first batch."""

    def train_dataloader(self: Any) -> Any:
        return DataLoader(super().train_dataloader().batches, batch_size=None)


class KeepsHistory(LightningModule):
    """Trait: save the history in checkpoints, and keep the state of optimizers and callbacks when training ends."""

    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = {"seen": self.seen, "validations": list(self.validations)}

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint["history"]["seen"]
        self.validations = list(checkpoint["history"]["validations"])

    def on_train_end(self: Any) -> None:
        super().on_train_end()
        self.momentum = [
            _copy(state["momentum_buffer"]) for opt in self.trainer.optimizers for state in opt.state.values()
        ]
        self.states = states(self.trainer.callbacks)


class StatelessOptimizer(LightningModule):
    """Trait: an optimizer without momentum, and so without state."""

    def configure_optimizers(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class FusedWithInfinity(LightningModule):
    """Trait: a fused optimizer, and an infinite loss of the first optimizer in the micro-batch ``infinite``."""

    infinite = 6  # In the second epoch, within a step that is not its last, with windows of one and of four.

    def configure_optimizers(self: Any) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=self.cell.lr, momentum=MOMENTUM, fused=True) for net in self.nets]

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if loss is None else self.perhaps_infinite(loss)

    def optimize(self: Any, loss: Tensor, optimizer: Any) -> None:
        first = optimizer.optimizer is self.trainer.optimizers[0]
        super().optimize(self.perhaps_infinite(loss) if first else loss, optimizer)

    def perhaps_infinite(self: Any, loss: Tensor) -> Tensor:
        return loss * float("inf") if self.seen - 1 == self.infinite else loss


def build(cell: Cell, scores: tuple[float, ...] = (), *traits: type) -> Model:
    """Make the module of a cell with traits, which come first in the order of methods."""
    kind = type(models.build(cell, scores))
    return type(kind.__name__, (*traits, kind), {})(cell, scores)


@dataclass
class Fitted:
    """A fit that is over or that failed.

    Attributes:
        weights: Final weights, if they are kept although the module may change later.
        states: States of the callbacks, if they are kept although the callbacks may be used again.
    """

    trainer: Trainer
    module: Any
    callbacks: list[Callback]
    logged: dict[str, dict[int, float]]
    weights: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> list[Any]:
        return [callback for callback in self.callbacks if isinstance(callback, OptimCallback)]

    @property
    def outcome(self) -> Outcome:
        final = self.weights or models.full_weights(self.module)
        return Outcome(final, self.module.raw, self.module.validations, self.module.seen, self.logged)


def prepare(
    entry: Entry,
    cell: Cell = CELL,
    *traits: type,
    extra: tuple[Callback, ...] = (),
    callbacks: Any = None,
    **changes: Any,
) -> Fitted:
    """Make a Trainer, a module and the callbacks of an entry, ready for ``fit``.

    Args:
        extra: More callbacks, which come last. One is left out if the entry has a callback of its key.
        callbacks: Callbacks in place of those of the entry.
        changes: Arguments of the Trainer in place of those of the cell.
    """
    chosen = [*(entry.all_callbacks(cell) if callbacks is None else callbacks)]
    keys = {callback.state_key for callback in chosen}
    chosen += [callback for callback in extra if callback.state_key not in keys]
    recorder = run.Recorder()
    trainer = run.make_trainer(cell, chosen, **({"logger": recorder, "max_epochs": entry.epochs} | changes))
    return Fitted(trainer, build(cell, entry.scores, *traits), chosen, recorder.logged)


def fit(
    entry: Entry,
    cell: Cell = CELL,
    *traits: type,
    ckpt_path: Any = None,
    weights_only: bool | None = None,
    **options: Any,
) -> Fitted:
    """Train the cell's module with the callbacks of an entry."""
    fitted = prepare(entry, cell, *traits, **options)
    trusted = supported(fitted.trainer.fit, weights_only=weights_only)
    fitted.trainer.fit(fitted.module, ckpt_path=ckpt_path, **trusted)
    return fitted


@functools.cache
def reference_fit(entry: Entry, cell: Cell = CELL) -> Fitted:
    """Fit without any disturbance, once for all tests that compare with it."""
    fitted = fit(entry, cell, KeepsHistory)
    return dataclasses.replace(fitted, weights=models.full_weights(fitted.module), states=states(fitted.callbacks))


def choice_for(entry: Entry, *choices: Any) -> Any:
    """Return one of several choices for an entry; over all entries, each choice occurs."""
    return choices[entry.turn % len(choices)]


def states(callbacks: Any) -> dict[str, Any]:
    """Copy the state of each of our callbacks, as a checkpoint would hold it; every rank calls this.

    The state of ``ExactResume`` is left out: it describes the random generators of the process at this moment.
    """
    ours = [cb for cb in callbacks if isinstance(cb, OptimCallback) and not isinstance(cb, ExactResume)]
    return {callback.state_key: copied(callback.state_dict()) for callback in ours}


def _copy(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copied(value) for value in tree]
    return _copy(tree) if isinstance(tree, Tensor) else tree


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the paths at which two nested structures differ in a bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{path}/{key}" for key in one.keys() ^ other.keys()]
        return missing + _joined(
            differences(one[key], other[key], f"{path}/{key}") for key in one.keys() & other.keys()
        )
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return _joined(differences(a, b, f"{path}/{i}") for i, (a, b) in enumerate(zip(one, other, strict=True)))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and _equal(one, other) else [path]
    return [] if one == other or (one != one and other != other) else [f"{path}: {one!r} and {other!r}"]


def _equal(one: Tensor, other: Tensor) -> bool:
    same = torch.equal(one, other)
    return same or (one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all()))


def _joined(lists: Any) -> list[str]:
    return [item for some in lists for item in some]


def assert_same(one: Fitted, other: Fitted) -> None:
    """Assert that two runs have the same weights, validations, batches and logs, bit for bit."""
    a, b = one.outcome, other.outcome
    assert not differences(vars(a), vars(b))
