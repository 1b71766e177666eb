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

from lightning_optim import EMA, L1, L2, ClipByNorm, GradientAccumulation, GradientClipping, OptimCallback, WeightAveraging
from lightning_optim import WeightRegularization
from tests.life.tools import Fitted, each_entry, prepare
from tests.machine import problem
from tests.machine.cells import Cell
from tests.registry import BY_NAME, Entry

STEPS = Cell("automatic", "32-true", "single", "1")
ASKING = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero", "aten::is_nonzero")
SILENT: dict[str, Any] = {"limit_val_batches": 0, "log_every_n_steps": 10**6, "logger": False}


class Watching(TorchDispatchMode):
    """Counts what asks the device, and keeps the largest fresh output of an operator, while ``inside`` a hook of ours."""

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
    for callback in fitted.ours:
        for hook in ("on_before_optimizer_step", "on_after_optimizer_step", "on_before_backward", "on_train_batch_start"):
            setattr(callback, hook, _within(watching, getattr(callback, hook), callback, steps_from))
    with watching:
        fitted.trainer.fit(fitted.module)
    return watching


def _within(watching: Watching, hook: Any, callback: OptimCallback, steps_from: int) -> Any:
    def call(*args: Any) -> Any:
        watching.inside = callback.steps[0] >= steps_from
        try:
            return hook(*args)
        finally:
            watching.inside = False

    return call


@each_entry
def test_entry(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "HIDDEN", 100_000)
    fitted = prepare(entry, STEPS, **SILENT)
    model = sum(p.numel() for p in fitted.module.parameters())
    watching = watched(fitted, steps_from=2)
    print(entry.name, dict(watching.asked), round(watching.largest / model, 3), watching.by)
