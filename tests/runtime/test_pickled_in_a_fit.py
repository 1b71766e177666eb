"""Test that Trainer, module and callbacks can be pickled and copied in every hook of a fit, as without ours."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import (
    EMA,
    L1,
    L2,
    ActivationRegularization,
    CheckpointAveraging,
    EarlyStopping,
    ExactResume,
    Flooding,
    GradientAccumulation,
    GradientClipping,
    GradientMonitor,
    OptimCallback,
    ProximalL1,
    ScheduledDropout,
    StochasticWeightAveraging,
    WeightAveraging,
    WeightRegularization,
)
from lightning_optim.runtime.patching import Patch
from tests.averaging.models import Model, assert_equal, data, snapshot, trainer
from tests.lightning import Callback, ModelCheckpoint, Trainer

ONE_BY_ONE: dict[str, Callable[[], OptimCallback]] = {
    "accumulation": lambda: GradientAccumulation(2),
    "penalty": lambda: WeightRegularization([L2(1e-3), ProximalL1(1e-3)]),
    "dropout": lambda: ScheduledDropout({"*": 0.1}, insert=True),
    "activations": lambda: ActivationRegularization(L1(1e-3), on="*"),
    "flooding": lambda: Flooding(0.1),
    "monitor": GradientMonitor,
    "clipping": lambda: GradientClipping(0.1),
    "EMA": lambda: WeightAveraging(EMA(0.8)),
    "checkpoints": lambda: CheckpointAveraging(top=2),
    "stopping": lambda: EarlyStopping("val_loss", patience=math.inf),
    "resume": ExactResume,
}
CALLBACKS: dict[str, Callable[[], list[OptimCallback]]] = {
    **{name: lambda make=make: [make()] for name, make in ONE_BY_ONE.items()},  # type: ignore[misc]
    "SWA": lambda: [StochasticWeightAveraging()],
    "all": lambda: [make() for make in ONE_BY_ONE.values()],
}


class Copying(Callback):
    """Copy the Trainer, the module and the callbacks in each hook."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def copy(self, hook: str, trainer: Any) -> None:
        self.seen.add(hook)
        for thing in (trainer, trainer.lightning_module, trainer.callbacks):
            pickle.loads(pickle.dumps(thing))
        for copied in (pickle.loads(pickle.dumps(trainer)), copy.deepcopy(trainer)):
            assert type(copied) is Trainer and copied.strategy.__class__ is trainer.strategy.__class__
            for owner in (copied, copied.strategy, copied.fit_loop, copied.lightning_module, *copied.callbacks):
                assert not any(isinstance(value, Patch) for value in vars(owner).values()), f"{hook}: {owner}"
            for name in ("save_checkpoint", "optimizer_step", "teardown"):
                assert getattr(copied.strategy, name).__self__ is copied.strategy

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.copy("on_fit_start", trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.copy("on_train_start", trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.copy("on_before_optimizer_step", trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.copy("on_train_batch_end", trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.copy("on_validation_end", trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.copy("on_save_checkpoint", trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.copy("on_train_end", trainer)


def fitted(callbacks: list[Any], folder: Path, module: Model | None = None) -> Model:
    module = module or Model()
    saver = ModelCheckpoint(folder, monitor="val_loss", save_top_k=2)
    trainer([*callbacks, saver], max_epochs=2, enable_checkpointing=True).fit(module, data(4), data(2))
    return module


@pytest.mark.parametrize("name", CALLBACKS)
def test_everything_can_be_copied_in_each_hook(name: str, tmp_path: Path) -> None:
    copying = Copying()
    copied = fitted([*CALLBACKS[name](), copying], tmp_path / "copied")
    assert len(copying.seen) == 7
    assert_equal(snapshot(copied), snapshot(fitted(CALLBACKS[name](), tmp_path / "not")))


class Holding(Model):
    """Has the callbacks among its hyper-parameters, as neuralforecast's models do: each checkpoint holds them."""

    def __init__(self, callbacks: list[Any]) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_module_may_have_the_callbacks_among_its_hyper_parameters(tmp_path: Path) -> None:
    callbacks = CALLBACKS["all"]()
    module = fitted(callbacks, tmp_path / "held", Holding(callbacks))
    assert_equal(snapshot(module), snapshot(fitted(CALLBACKS["all"](), tmp_path / "not")))
    for path in (tmp_path / "held").glob("epoch*.ckpt"):
        held = torch.load(path, weights_only=False)["hyper_parameters"]["callbacks"]
        assert [type(one) for one in held] == [type(one) for one in callbacks]
        assert all(one.fit is None and "state_dict" not in vars(one) for one in held)
