"""The soft threshold: its formula, its properties, and a proximal term within a fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim import L2, Linear, ProximalL1, WeightRegularization
from tests.lightning import BoringModel, Trainer


def test_soft_threshold_on_a_few_numbers() -> None:
    weight = torch.tensor([[1.0, -1.0], [0.2, -0.2]])
    ProximalL1(2.0).project_([weight], lr=0.25)
    assert weight.tolist() == [[0.5, -0.5], [0.0, 0.0]]


def test_is_the_minimizer_of_distance_and_penalty() -> None:
    # prox(w) = argmin_x (x - w)^2 / 2 + lr * s * |x|, on a fine grid.
    weights = torch.linspace(-2, 2, 41, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    cost = 0.5 * (grid - weights[:, None]) ** 2 + 0.1 * 3.0 * grid.abs()
    found = weights.clone()
    ProximalL1(3.0).project_([found], lr=0.1)
    assert torch.allclose(found, grid[cost.argmin(1)], atol=1e-4)


def test_nothing_grows_and_small_weights_become_zero() -> None:
    before = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    weight = before.clone()
    ProximalL1(1.0).project_([weight], lr=0.3)
    assert (weight.abs() <= before.abs()).all()
    assert torch.equal(weight == 0, before.abs() <= 0.3)


def test_strength_follows_its_schedule() -> None:
    weight = torch.ones(1)
    ProximalL1(Linear(0.5, 0.0)).project_([weight], lr=1.0, step=10, total=11)
    assert weight.item() == 1.0
    ProximalL1(Linear(0.5, 0.0)).project_([weight], lr=1.0, step=0, total=11)
    assert weight.item() == 0.5


class Still(BoringModel):
    """Module with gradients of zero, so that only the proximal step moves the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[float] = []
        with torch.no_grad():
            self.layer.weight.fill_(2.0)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return 0.0 * self(batch).sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.largest.append(float(self.layer.weight.detach().max()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_in_a_fit_the_schedule_counts_the_steps_before() -> None:
    """The first step uses the start of the schedule, and the last step its end."""
    model, strengths = Still(), [1.0, 0.75, 0.5, 0.25, 0.0]
    term = ProximalL1(Linear(1.0, 0.0))
    Trainer(max_steps=5, barebones=True, callbacks=[WeightRegularization(term)]).fit(model)
    left = [2.0 - 0.5 * sum(strengths[: step + 1]) for step in range(5)]
    assert model.largest == pytest.approx(left, abs=1e-6)


class Thawing(BoringModel):
    """Module with a layer that is in the optimizer from the start, and frozen in the first of two epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Linear(2, 2).requires_grad_(False)
        self.after: list[torch.Tensor] = []

    def on_train_epoch_start(self) -> None:
        self.other.requires_grad_(self.current_epoch == 1)

    def on_train_epoch_end(self) -> None:
        self.after.append(self.other.weight.detach().clone())


@pytest.mark.parametrize("term", [L2(0.1), ProximalL1(0.1)], ids=repr)
def test_frozen_weights_are_left_alone_until_they_are_unfrozen(term: Any) -> None:
    """A layer without a gradient is penalized too, when it is trainable."""
    model = Thawing()
    before = model.other.weight.detach().clone()
    Trainer(max_epochs=2, limit_train_batches=2, barebones=True, callbacks=[WeightRegularization(term)]).fit(model)
    assert torch.equal(model.after[0], before)
    assert (model.after[1].abs() < before.abs()).all()


def test_a_fit_ends_sparse_where_the_penalty_does_not() -> None:
    torch.manual_seed(0)
    model = BoringModel()
    trainer = Trainer(max_steps=20, barebones=True, callbacks=[WeightRegularization(ProximalL1(1.0))])
    trainer.fit(model)
    assert (model.layer.weight == 0).any()
    assert (model.layer.bias != 0).all()  # one dimension: not chosen by default


@pytest.mark.parametrize("strength", [-1.0, "much", True])
def test_wrong_strength(strength: object) -> None:
    with pytest.raises(ValueError, match="strength"):
        ProximalL1(strength)  # type: ignore[arg-type]
