"""What a step costs that is not logged: no word from the device to the host, and no temporary of the model's size."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
from tests.integration.entry_fits import Fitted, each_entry, prepare
from tests.registry import BY_NAME, Entry

ASKING = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero", "aten::is_nonzero")
SILENT: dict[str, Any] = {"limit_val_batches": 0, "log_every_n_steps": 10**6, "logger": False}


class Watching(TorchDispatchMode):
    """Counts what asks the device, and keeps the largest fresh output of an operator, ``inside`` a hook of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.largest, self.by, self.inside = 0, "", True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if self.inside and name in ASKING:
            self.asked[name] += 1
        output = func(*args, **(kwargs or {}))
        if self.inside:
            self._note(name, tree_leaves((args, kwargs)), tree_leaves(output))
        return output

    def _note(self, name: str, inputs: list[Any], outputs: list[Any]) -> None:
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs if isinstance(tensor, Tensor)}
        fresh = [t for t in outputs if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known]
        size = sum(tensor.numel() for tensor in fresh)
        if size > self.largest:
            self.largest, self.by = size, name


def watched(fitted: Fitted, steps_from: int) -> Watching:
    """Train, and watch what the hooks of our callbacks do around the steps from this one on."""
    watching = Watching()
    watching.inside = False
    hooks = ("on_before_optimizer_step", "on_after_optimizer_step", "on_before_backward", "on_train_batch_start")
    # In the classes: a hook on the object itself would be called after that of the class.
    with pytest.MonkeyPatch.context() as patch, watching:
        for kind in {type(callback) for callback in fitted.ours}:
            for hook in hooks:
                patch.setattr(kind, hook, _within(watching, getattr(kind, hook), steps_from))
        fitted.trainer.fit(fitted.module)
    return watching


def _within(watching: Watching, hook: Any, steps_from: int) -> Any:
    def call(callback: OptimCallback, *args: Any) -> Any:
        before, watching.inside = watching.inside, callback.steps[0] >= steps_from
        try:
            return hook(callback, *args)
        finally:
            watching.inside = before

    return call


class SmallSteps(Cell):
    """A wide network diverges at the rate of the others."""

    @property
    def lr(self) -> float:
        return 1e-6


STEPS = SmallSteps("automatic", "32-true", "single", "1")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.2 million weights, two thirds of them in one tensor: what works by pieces has pieces to make."""
    monkeypatch.setattr(regression, "HIDDEN", 100_000)


def deciding(fitted: Fitted) -> list[Any]:
    """Whoever must know on the host whether a step is finite."""
    return [callback for callback in fitted.ours if getattr(callback, "nonfinite", "ignore") != "ignore"]


@each_entry
def test_entry(entry: Entry) -> None:
    """A decision costs one word a step; all else costs none. At most one parameter is copied at a time."""
    fitted = prepare(entry, STEPS, **SILENT)
    watching = watched(fitted, steps_from=2)
    steps = max((callback.steps[0] for callback in fitted.ours), default=0)
    assert sum(watching.asked.values()) <= len(deciding(fitted)) * (steps - 2), watching.asked
    assert watching.largest <= max(p.numel() for p in fitted.module.parameters()), watching.by


@each_entry
def test_entry_without_a_decision(entry: Entry) -> None:
    fitted = prepare(entry, STEPS, **SILENT)
    for callback in deciding(fitted):
        callback.nonfinite = "ignore"
    assert not watched(fitted, steps_from=2).asked


def ground_floor() -> list[Any]:
    return [
        WeightRegularization([L1(1e-4), L2(1e-4)]),
        GradientClipping(ClipByNorm(0.1), nonfinite="ignore"),
        GradientAccumulation(2),
        WeightAveraging(EMA(0.9)),
    ]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_ground_floor_together(precision: Any) -> None:
    """Nothing of the model's size is made: a quarter of it at most, which is a piece of some MB."""
    fitted = prepare(BY_NAME["plain"], STEPS, callbacks=ground_floor(), precision=precision, **SILENT)
    watching = watched(fitted, steps_from=2)  # the first update makes the average
    assert [callback.steps for callback in fitted.ours] == [[4]] * 4
    assert not watching.asked
    assert watching.largest < 0.25 * sum(p.numel() for p in fitted.module.parameters()), watching.by


class Wasteful(OptimCallback):
    """What the tests above must see: a question to the device, and copies of all the weights in one act."""

    def on_after_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
        torch._foreach_mul(list(pl_module.parameters()), 2.0)
        assert float(next(pl_module.parameters()).sum()) < 1e9


def test_waste_is_seen() -> None:
    fitted = prepare(BY_NAME["plain"], STEPS, callbacks=[Wasteful()], **SILENT)
    watching = watched(fitted, steps_from=2)
    assert sum(watching.asked.values()) == 7
    assert watching.largest == sum(p.numel() for p in fitted.module.parameters())
