"""Flooding: the formula in a hand-written loop, with each kind of loss; warnings; what it counts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_optim import (
    Flooding,
    GradientAccumulation,
    Linear,
    ManualOptimizationMixin,
    OptimCallback,
    Schedule,
    SharpnessAwareMixin,
)
from tests.lightning import PACKAGE, LightningModule, MisconfigurationException, MixedPrecision, Trainer

BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
LEVEL = 2.0  # near the losses of these batches, so that some are above it and some below


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        self.losses: list[Tensor] = []

    def loss_of(self, batch: Tensor) -> Tensor:
        loss = mse_loss(self.layer(batch.double()), torch.full((4, 2), 1.3, dtype=torch.float64))
        self.losses.append(loss.detach())
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss_of(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)

    def train_dataloader(self) -> Any:
        return DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]


class Dictionary(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": self.loss_of(batch), "other": batch}


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss_of(batch))
        optimizer.step()


class Optimized(ManualOptimizationMixin, Manual):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.optimize(self.loss_of(batch))


def fit(
    model: LightningModule, *callbacks: Any, epochs: int = 2, ckpt_path: str | None = None, **arguments: Any
) -> Trainer:
    quiet: dict[str, Any] = {
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **(quiet | arguments))
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


def by_hand(window: int = 1, level: Callable[[int], float] = lambda step: LEVEL) -> tuple[Tensor, list[Tensor]]:
    """Return the weights after two epochs of minimizing ``|J - b| + b``, and the losses."""
    net = Net()
    optimizer = net.configure_optimizers()
    for position, batch in enumerate(BATCHES * 2):
        loss = net.loss_of(batch)
        flooded = (loss - level(position // window)).abs() + level(position // window)
        (flooded / window).backward()
        if position % window == window - 1:
            optimizer.step()
            optimizer.zero_grad()
    return net.layer.weight.detach(), net.losses


@pytest.mark.parametrize("kind", [Net, Dictionary, Manual, Optimized], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_equals_the_formula_by_hand(kind: type[Net], window: int, scaled: bool) -> None:
    if kind is Manual and window > 1:
        return  # a module that steps itself does not accumulate
    model = kind()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10)) if scaled else None
    if plugin is not None:  # the loss scale without the rounding of half precision
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    accumulation = [GradientAccumulation(window)] if window > 1 else []
    fit(model, Flooding(LEVEL), *accumulation, **({"plugins": [plugin]} if scaled else {}))
    weight, losses = by_hand(window)
    assert any(loss < LEVEL for loss in losses) and any(loss > LEVEL for loss in losses)
    assert torch.allclose(model.layer.weight, weight, rtol=1e-12, atol=1e-12)
    assert torch.allclose(torch.stack(model.losses), torch.stack(losses), rtol=1e-12)


def test_the_level_follows_optimizer_steps() -> None:
    model = Net()
    fit(model, Flooding(Linear(0.0, 4.0)), GradientAccumulation(2))
    weight, _ = by_hand(2, level=lambda step: 4.0 * step / 7)
    assert torch.allclose(model.layer.weight, weight, rtol=1e-12, atol=1e-12)


class Constant(Net):
    """Module whose loss is one parameter, and whose gradient is kept."""

    def __init__(self, loss: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(loss))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.value * 1.0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert self.value.grad is not None
        self.gradient = self.value.grad.clone()


@pytest.mark.parametrize(
    ("loss", "factor"), [(0.5, 1.0), (0.25, 0.0), (0.1, -1.0), (math.inf, 1.0), (-math.inf, -1.0), (math.nan, math.nan)]
)
def test_factor_of_the_gradient(loss: float, factor: float) -> None:
    model = Constant(loss)
    fit(model, Flooding(0.25), epochs=1, limit_train_batches=1, fast_dev_run=True)
    assert float(model.gradient) == pytest.approx(factor, nan_ok=True)


def test_two_backward_passes_of_one_loss_are_flooded_once_each() -> None:
    class Twice(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = self.loss_of(batch)
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss, retain_graph=True)
            weight = self.layer.weight
            assert weight.grad is not None
            self.grad, self.plain = weight.grad.clone(), torch.autograd.grad(loss, weight)[0]

    model = Twice()
    fit(model, Flooding(100.0), fast_dev_run=True)
    assert torch.allclose(model.grad, -2.0 * model.plain)


def test_both_passes_of_sharpness_aware_steps_are_flooded_and_one_is_counted() -> None:
    class Sharp(SharpnessAwareMixin, Net):
        pass

    model, callback = Sharp(rho=0.1), Flooding(LEVEL)
    fit(model, callback)
    first = torch.stack(model.losses[::2])
    assert callback.extra_state()["seen"] == 16
    assert int(callback.extra_state()["below"]) == int((first < LEVEL).sum())


# ---- messages --------------------------------------------------------------------------------------------------------


def test_a_level_that_no_loss_of_the_first_epoch_reaches_is_told_once() -> None:
    with pytest.warns(UserWarning, match="Every loss of the first epoch was below") as caught:
        fit(Net(), Flooding(1e6), epochs=2)
    assert len([one for one in caught if "Every loss" in str(one.message)]) == 1


@pytest.mark.parametrize("level", [LEVEL, Linear(0.0, 1e6)], ids=repr)
def test_no_other_level_is_told(level: float | Schedule) -> None:
    fit(Net(), Flooding(level))  # a warning of this package is an error in the tests


def test_share_of_flooded_micro_batches(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    logger = logging.getLogger(f"{PACKAGE}.callbacks.model_summary")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger.name):
        fit(model, Flooding(LEVEL), enable_model_summary=True)
    logger.removeHandler(caplog.handler)
    share = float((torch.stack(model.losses) < LEVEL).double().mean())
    assert f"{100 * share:.1f} % of 16 micro-batches had a loss below the flooding level" in caplog.text
    assert "the training loss is kept near 2.0 (flooding)" in caplog.text


def test_a_second_fit_counts_anew_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    callback, model = Flooding(1e6), Net()
    for _ in range(2):
        with pytest.warns(UserWarning, match="Every loss of the first epoch was below"):
            trainer = fit(model, callback, epochs=1)
        assert (callback.extra_state()["seen"], int(callback.rank_state()["below"])) == (8, 8)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Flooding(1e6)
    fit(model, resumed, epochs=2, ckpt_path=str(tmp_path / "one.ckpt"))  # a second warning would be an error here
    assert (resumed.extra_state()["seen"], int(resumed.rank_state()["below"])) == (16, 16)


def test_lbfgs_is_refused() -> None:
    class Searching(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), line_search_fn="strong_wolfe")

    with pytest.raises(MisconfigurationException, match="line search"):
        fit(Searching(), Flooding(0.1))


# ---- losses of micro-batches -----------------------------------------------------------------------------------------


class Watching(OptimCallback):
    """Keep the losses and the gradients that arrive at them, and multiply the latter by a factor."""

    def __init__(self, factor: float | None = None) -> None:
        super().__init__()
        self.factor = factor
        self.seen: list[tuple[float, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.session.on_loss(self, self.see)

    def see(self, loss: Tensor, grad: Tensor) -> Tensor | None:
        self.seen.append((float(loss), float(grad)))
        return None if self.factor is None else torch.tensor(self.factor)


@pytest.mark.parametrize("kind", [Net, Optimized], ids=lambda kind: kind.__name__)
def test_all_callbacks_get_the_gradient_as_it_arrives(kind: type[Net]) -> None:
    first, second = Watching(3.0), Watching()
    second.name = "second"
    model = kind()
    fit(model, first, second, GradientAccumulation(4), epochs=1)
    assert first.seen == second.seen == [(float(loss), 0.25) for loss in model.losses]


def test_a_callback_that_was_taken_out_of_the_list_gets_none() -> None:
    class TakenOut(Net):
        def on_train_start(self) -> None:
            self.trainer.callbacks = [one for one in self.trainer.callbacks if not isinstance(one, Watching)]

    callback = Watching()
    fit(TakenOut(), callback, Flooding(0.1), epochs=1)
    assert callback.seen == []
