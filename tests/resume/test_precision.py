"""Test that a resume rounds no weight, and that averages stay exact after values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_optim import EMA, SWA, EarlyStopping, GradientClipping, WeightAveraging
from lightning_optim.resume.exact_resume import ExactResume
from tests.integration.forked_processes import killed
from tests.lightning import LightningModule
from tests.resume.killed_runs import WriteAndDie, difference, fit
from tests.resume.models import NormNet, data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.ckpt"


# ---- precision -------------------------------------------------------------------------------------------------------


def nothing() -> list[Any]:
    return []


def averaged() -> list[Any]:
    return [WeightAveraging(EMA(0.9))]


def averaged_in_the_weights_own_dtype() -> list[Any]:
    return [WeightAveraging(SWA(), dtype=None)]


def best_restored() -> list[Any]:
    # Nothing improves by so much: the best is of the first check, before the checkpoint.
    return [EarlyStopping("val_loss", patience=math.inf, min_delta=9.0)]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("more", [nothing, averaged, averaged_in_the_weights_own_dtype, best_restored])
def test_weights_are_not_rounded(more: Callable[[], list[Any]], precision: str, path: Path) -> None:
    """Lightning restores weights before it converts the module."""

    def run(*callbacks: Any, **arguments: Any) -> dict[str, Any]:
        return fit([ExactResume(), *more(), *callbacks], net=NormNet, precision=precision, **arguments)

    killed(lambda: run(WriteAndDie("on_train_batch_end", 8, path)))
    assert difference(run(path=path, seed=2), run()) == ""


def test_average_is_not_rounded_without_exact_resume(path: Path) -> None:
    def run(*callbacks: Any, **arguments: Any) -> dict[str, Any]:
        average = WeightAveraging(SWA(), dtype=None, buffers="average")
        loader = DataLoader(data(), batch_size=8)
        outcome = fit([average, *callbacks], lambda: loader, net=NormNet, precision="64-true", **arguments)
        return {**outcome, "events": []}

    killed(lambda: run(WriteAndDie("on_train_epoch_end", 1, path)))
    assert difference(run(path=path), run()) == ""


# ---- not finite ------------------------------------------------------------------------------------------------------


class NetWithABrokenBatch(NormNet):
    """Load a batch with a NaN, whose step is skipped; the raw running statistics stay NaN from there on."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        if self.trainer.fit_loop.total_batch_idx == 4:
            inputs = inputs.clone()
            inputs[0] = torch.nan
        return super().training_step([inputs, targets], batch_idx)


class WhenTrainingEnds(EarlyStopping):
    """Keep the averages at the end of training."""

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        (average,) = (cb for cb in trainer.callbacks if isinstance(cb, WeightAveraging))
        self.averages = {name: tensor.clone() for name, tensor in average.averaged_state().items()}


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
@pytest.mark.parametrize("buffers", ["average", "refresh"])
@pytest.mark.parametrize("call", [5, 8])
def test_averages_after_a_skipped_step_and_an_early_stop(call: int, buffers: Any, path: Path) -> None:
    """The average starts after the step that was skipped, and the run ends at an early stop."""

    def run(*callbacks: Any, **arguments: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        stopping = WhenTrainingEnds("val_loss", patience=4, min_delta=9.0, check_finite=False, restore_best=False)
        average = WeightAveraging(SWA(), start=6, evaluate=False, buffers=buffers)
        ours = [ExactResume(), GradientClipping(1.0), average, stopping]
        outcome = fit([*ours, *callbacks], net=NetWithABrokenBatch, **arguments)
        return outcome, stopping.averages

    killed(lambda: run(WriteAndDie("on_train_batch_end", call, path)))
    (whole, averages), (resumed, again) = run(), run(path=path, seed=2)
    assert sum(event[0] == "train" for event in whole["events"]) == 15, "of 18 batches"
    assert repr(resumed["events"]) == repr(whole["events"])
    assert averages.keys() == again.keys() and "body.1.running_mean" in averages
    # NaN is not equal to itself.
    assert all(torch.equal(averages[name].nan_to_num(9.0), again[name].nan_to_num(9.0)) for name in averages)
