"""A step that is not logged: the host reads nothing from the device, and no temporary has the size of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim import (
    EMA,
    L1,
    L2,
    ClipByNorm,
    GradientAccumulation,
    GradientClipping,
    OptimCallback,
    WeightAveraging,
    WeightRegularization,
)
from tests.harness import regression
from tests.harness.cells import Cell
from tests.harness.operators import Operators
from tests.integration.entry_fits import TENSOR_ENTRIES, Fitted, each_entry, prepare
from tests.lightning import LightningModule
from tests.registry import BY_NAME, Entry

SILENT: dict[str, Any] = {"limit_val_batches": 0, "log_every_n_steps": 10**6, "logger": False}


def watched(fitted: Fitted, steps_from: int) -> Operators:
    """Train, and watch the operators in the hooks of our callbacks from this step on."""
    operators = Operators(on=False)
    hooks = ("on_before_optimizer_step", "on_after_optimizer_step", "on_before_backward", "on_train_batch_start")
    # In the classes: a hook on the object itself would be called after that of the class.
    with pytest.MonkeyPatch.context() as patch, operators:
        for kind in {type(callback) for callback in fitted.ours}:
            for hook in hooks:
                patch.setattr(kind, hook, _watching(operators, getattr(kind, hook), steps_from))
        fitted.trainer.fit(fitted.module)
    return operators


def _watching(operators: Operators, hook: Any, steps_from: int) -> Any:
    def call(callback: OptimCallback, *args: Any) -> Any:
        before, operators.on = operators.on, callback.steps[0] >= steps_from
        try:
            return hook(callback, *args)
        finally:
            operators.on = before

    return call


class SmallSteps(Cell):
    """A cell with a smaller learning rate: a wide network diverges at the rate of the other cells."""

    @property
    def lr(self) -> float:
        return 1e-6


pytestmark = pytest.mark.filterwarnings("ignore:EarlyStopping read no value")

STEPS = SmallSteps("automatic", "32-true", "single", "1")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the network so wide (1.2 million weights, two thirds in one tensor) that kernels work in several chunks."""
    monkeypatch.setattr(regression, "HIDDEN", 100_000)


def deciding(callbacks: list[Any]) -> list[Any]:
    """Return the callbacks that must know on the host whether a step is finite."""
    return [callback for callback in callbacks if getattr(callback, "nonfinite", "ignore") != "ignore"]


@each_entry
def test_entry(entry: Entry) -> None:
    """A decision costs one read by the host in each step, all else none. At most one parameter is copied at a time."""
    fitted = prepare(entry, STEPS, **SILENT)
    operators = watched(fitted, steps_from=2)
    steps = max((callback.steps[0] for callback in fitted.ours), default=0)
    assert operators.host_reads.total() <= len(deciding(fitted.ours)) * (steps - 2), operators.host_reads
    assert operators.largest <= max(p.numel() for p in fitted.module.parameters()), operators.largest_from


# The other entries decide nothing, so that the test above allows them no read.
DECIDING = [entry for entry in TENSOR_ENTRIES if deciding(entry.all_callbacks(STEPS))]


@pytest.mark.parametrize("entry", DECIDING, ids=lambda entry: entry.name)
def test_entry_without_a_decision(entry: Entry) -> None:
    fitted = prepare(entry, STEPS, **SILENT)
    for callback in deciding(fitted.ours):
        callback.nonfinite = "ignore"
    assert not watched(fitted, steps_from=2).host_reads.total()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_four_callbacks_together(precision: Any) -> None:
    """The largest new tensor holds at most a quarter of the model's elements, in chunks of some MB."""
    callbacks = [
        WeightRegularization([L1(1e-4), L2(1e-4)]),
        GradientClipping(ClipByNorm(0.1), nonfinite="ignore"),
        GradientAccumulation(2),
        WeightAveraging(EMA(0.9)),
    ]
    fitted = prepare(BY_NAME["plain"], STEPS, callbacks=callbacks, precision=precision, **SILENT)
    operators = watched(fitted, steps_from=2)  # the first update makes the average
    assert [callback.steps for callback in fitted.ours] == [[4]] * 4
    assert not operators.host_reads.total()
    assert operators.largest < 0.25 * sum(p.numel() for p in fitted.module.parameters()), operators.largest_from


class Wasteful(OptimCallback):
    """Read a value on the host, and copy all the weights in one operator, so that the tests above must see it."""

    def on_after_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
        torch._foreach_mul(list(pl_module.parameters()), 2.0)
        assert float(next(pl_module.parameters()).sum()) < 1e9


def test_waste_is_seen() -> None:
    fitted = prepare(BY_NAME["plain"], STEPS, callbacks=[Wasteful()], **SILENT)
    operators = watched(fitted, steps_from=2)
    assert operators.host_reads.total() == 7
    assert operators.largest == sum(p.numel() for p in fitted.module.parameters())
