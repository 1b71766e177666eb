"""What the tests of a callback's life share: a fit of an entry that can be looked into, modules with one more trait."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_optim import OptimCallback
from lightning_optim.resume.exact_resume import ExactResume
from tests.harness import models, regression, run
from tests.harness.cells import Cell
from tests.harness.models import Batch, Model
from tests.harness.reference_loop import Outcome
from tests.registry import ENTRIES, Entry

CELL = Cell("automatic", "32-true", "single", "4short")
"""One process, windows of four and a last one of two, a validation in the first window and one at the epoch's end."""

# Criteria see no tensor of the model: what one remembers, and how it resumes, is tested beside the criteria.
OF_TENSORS = tuple(entry for entry in ENTRIES if entry.cells != "strategies")
OF_SLOTS = tuple(entry for entry in ENTRIES if entry.cells == "all" or entry.name == "several")


def _each(entries: Sequence[Entry]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


each_entry = _each(OF_TENSORS)
each_slot = _each(OF_SLOTS)  # for what depends on the base class alone
each_kind = pytest.mark.parametrize("kind", ["automatic", "manual", "two"])


class Evaluating(LightningModule):
    """Tests and predicts on the validation data."""

    def test_step(self: Any, batch: Batch, batch_idx: int) -> None:
        losses = [regression.loss_of(index, self.nets, batch) for index in range(self.cell.optimizers)]
        self.log("test_loss", torch.stack(losses).sum())

    def predict_step(self: Any, batch: Batch, batch_idx: int) -> Tensor:
        return self.nets[0](batch[0])

    def test_dataloader(self: Any) -> Any:
        return self.val_dataloader()

    def predict_dataloader(self: Any) -> Any:
        return self.val_dataloader()


class BeginningAnew(LightningModule):
    """Data that begin anew when they are asked for again, wherever they were left."""

    def train_dataloader(self: Any) -> Any:
        return DataLoader(super().train_dataloader().batches, batch_size=None)


class Remembering(LightningModule):
    """Holds its history in checkpoints, and keeps what the optimizers and callbacks held when training ended."""

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


def build(cell: Cell, scores: tuple[float, ...] = (), *traits: type) -> Model:
    """The module of a cell, with traits."""
    kind = type(models.build(cell, scores))
    return type(kind.__name__, (*traits, kind), {})(cell, scores)


@dataclass
class Fitted:
    """A fit that is over, or failed; ``weights`` and ``states`` are there where they must outlive what comes after."""

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
    """A Trainer, a module and the callbacks of an entry, ready for ``fit``; ``extra`` come last, if not there yet."""
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
    fitted.trainer.fit(fitted.module, ckpt_path=ckpt_path, weights_only=weights_only)
    return fitted


@functools.cache
def whole(entry: Entry, cell: Cell = CELL) -> Fitted:
    """A fit that goes well, once for all tests that compare with it."""
    fitted = fit(entry, cell, Remembering)
    return dataclasses.replace(fitted, weights=models.full_weights(fitted.module), states=states(fitted.callbacks))


def turn(entry: Entry, *choices: Any) -> Any:
    """One of some choices for each entry, all of them over the entries."""
    return choices[ENTRIES.index(entry) % len(choices)]


def states(callbacks: Any) -> dict[str, Any]:
    """The state of each callback of ours, as a checkpoint would hold it; every rank calls this.

    Without that of ``ExactResume``, which is what the process draws from at the moment, and not what it has come to.
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
    """Where two trees are not the same, bit for bit."""
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
    """Two runs are the same, bit for bit."""
    a, b = one.outcome, other.outcome
    assert not differences(vars(a), vars(b))
