"""A compiled module, and one with a compiled submodule: the same weights, and the keys that Lightning saves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import regression
from tests.harness.cells import Cell
from tests.integration.entry_fits import (
    CELL,
    KeepsHistory,
    choice_for,
    differences,
    each_entry,
    fit,
    prepare,
    reference_fit,
)
from tests.lightning import ModelCheckpoint
from tests.registry import Entry

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using")

BACKEND = "eager"  # traces and guards as every backend does, and compiles no kernels


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CountsOutside:
    """Trait: count batches outside of the training step, which would else be compiled anew for each batch."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        return regression.loss_of(0, self.nets, batch)

    def on_train_batch_start(self: Any, *_: Any) -> None:
        self.seen += 1

    @torch.compiler.disable
    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)  # type: ignore[misc]


class CompiledSubmodule:
    """Trait: compile the network, and not the module around it."""

    def __init__(self: Any, *args: Any) -> None:
        super().__init__(*args)  # type: ignore[call-arg]
        self.net = torch.compile(self.net, backend=BACKEND)


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "last", save_weights_only=True)


@each_entry
def test_whole_module(entry: Entry, tmp_path: Path) -> None:
    fitted = prepare(entry, CELL, CountsOutside, extra=(saver(tmp_path),), enable_checkpointing=True)
    fitted.trainer.fit(torch.compile(fitted.module, backend=BACKEND))
    assert fitted.trainer.lightning_module is fitted.module
    assert torch._dynamo.utils.counters["frames"]["ok"]
    assert_as_uncompiled(fitted.outcome, reference_fit(entry).outcome)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert list(saved) == list(reference_fit(entry).module.state_dict())


@each_entry
def test_submodule(entry: Entry, tmp_path: Path) -> None:
    cell = Cell(choice_for(entry, "automatic", "manual"), "32-true", "single", "4short")
    extra = (saver(tmp_path), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    fitted = fit(entry, cell, KeepsHistory, CompiledSubmodule, extra=extra, enable_checkpointing=True)
    assert torch._dynamo.utils.counters["frames"]["ok"]
    assert_as_uncompiled(fitted.outcome, reference_fit(entry, cell).outcome)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert list(saved) == list(fitted.module.state_dict())
    assert all(name.startswith("net._orig_mod.") for name in saved)
    # Written after the first window, within the epoch and not before a validation.
    resumed = fit(entry, cell, KeepsHistory, CompiledSubmodule, ckpt_path=tmp_path / "step=1.ckpt")
    assert_as_uncompiled(resumed.outcome, reference_fit(entry, cell).outcome, logs=False)


def assert_as_uncompiled(outcome: Any, other: Any, logs: bool = True) -> None:
    assert (outcome.seen, outcome.validations) == (other.seen, other.validations)
    for what in ("raw", "final"):
        plain = {name.replace("_orig_mod.", ""): weight for name, weight in getattr(outcome, what).items()}
        assert not differences(plain, getattr(other, what)), what
    for name, values in other.logged.items() if logs else ():
        assert outcome.logged[name] == values, name
