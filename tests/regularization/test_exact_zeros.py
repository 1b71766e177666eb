"""Exact zeros: in a linear model those of scikit-learn, and in a network on real data nine weights in ten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim import (
    L1,
    L2,
    ElasticNet,
    NonNegative,
    Penalty,
    Proximal,
    ProximalGroupLasso,
    ProximalL1,
    WeightRegularization,
)
from tests.lightning import LightningModule, Trainer

linear_model = pytest.importorskip("sklearn.linear_model")
datasets = pytest.importorskip("sklearn.datasets")


# ---- a linear model --------------------------------------------------------------------------------------------------


class Regression(LightningModule):
    """Linear model with the loss of scikit-learn, the sum of squares / (2 n), and a learning rate below 1 / L."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs.shape[1], targets.shape[1], dtype=inputs.dtype)
        self.data = DataLoader([(inputs, targets)], batch_size=None)
        self.lr = 0.8 * len(inputs) / float(torch.linalg.matrix_norm(inputs, 2)) ** 2

    def train_dataloader(self) -> Any:
        return self.data

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return 0.5 * (self.linear(inputs) - targets).square().sum() / len(inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def diabetes() -> tuple[Tensor, Tensor]:
    """Return inputs [442, 10] and targets [442, 1]; all columns have deviation 1, and the targets a mean beside 0."""
    inputs, targets = (torch.from_numpy(array) for array in datasets.load_diabetes(return_X_y=True))
    return (inputs - inputs.mean(0)) / inputs.std(0), (targets / targets.std())[:, None]


def fitted(terms: list[Penalty | Proximal], inputs: Tensor, targets: Tensor) -> nn.Linear:
    torch.manual_seed(0)
    model = Regression(inputs, targets)
    Trainer(max_steps=800, max_epochs=-1, barebones=True, callbacks=[WeightRegularization(terms)]).fit(model)
    return model.linear.requires_grad_(False)


def assert_same(terms: list[Penalty | Proximal], oracle: Any, inputs: Tensor, targets: Tensor) -> int:
    """Assert that a fit ends at the oracle's weights and zeros, and return the number of zeros."""
    oracle.fit(inputs.numpy(), targets.squeeze(1).numpy())
    linear = fitted(terms, inputs, targets)
    wanted = torch.from_numpy(oracle.coef_).view_as(linear.weight)
    assert torch.allclose(linear.weight, wanted, rtol=0.0, atol=1e-6)
    assert torch.equal(linear.weight == 0.0, wanted == 0.0)
    assert torch.allclose(linear.bias, torch.as_tensor(oracle.intercept_), rtol=0.0, atol=1e-6)
    return int((wanted == 0.0).sum())


@pytest.mark.parametrize(("alpha", "zeros"), [(0.02, 3), (0.1, 6), (0.3, 8)])
def test_lasso(alpha: float, zeros: int) -> None:
    oracle = linear_model.Lasso(alpha=alpha, tol=1e-12, max_iter=100_000)
    assert assert_same([ProximalL1(alpha)], oracle, *diabetes()) == zeros


@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_elastic_net(ratio: float) -> None:
    """scikit-learn's penalty has a half: ``alpha * ratio * |w| + alpha * (1 - ratio) / 2 * w^2``."""
    alpha, oracle = 0.2, linear_model.ElasticNet(alpha=0.2, l1_ratio=ratio, tol=1e-12, max_iter=100_000)
    terms = [ProximalL1(alpha * ratio), L2(alpha * (1.0 - ratio) / 2.0)]
    assert assert_same(terms, oracle, *diabetes()) > 0


@pytest.mark.parametrize("alpha", [0.3, 0.6])
def test_group_lasso(alpha: float) -> None:
    """In scikit-learn's MultiTaskLasso a group holds the weights of one input for all tasks."""
    inputs, targets = diabetes()
    kept, tasks = inputs[:, [0, 1, 2, 4, 5, 6, 7, 9]], torch.cat([targets, inputs[:, [3, 8]]], dim=1)
    oracle = linear_model.MultiTaskLasso(alpha=alpha, tol=1e-12, max_iter=100_000)
    zeros = assert_same([ProximalGroupLasso(alpha, dim=1)], oracle, kept, tasks)
    assert zeros and zeros % 3 == 0


def test_non_negative_least_squares() -> None:
    assert assert_same([NonNegative()], linear_model.LinearRegression(positive=True), *diabetes()) > 0


@pytest.mark.parametrize("penalty", [L1(0.1), ElasticNet(0.1, 0.0)], ids=repr)
def test_a_penalty_by_gradient_comes_near_and_makes_no_zero(penalty: Penalty) -> None:
    inputs, targets = diabetes()
    wanted = linear_model.Lasso(alpha=0.1).fit(inputs.numpy(), targets.numpy()).coef_
    found = fitted([penalty], inputs, targets).weight
    assert torch.allclose(found, torch.from_numpy(wanted), atol=0.05)
    assert (wanted == 0.0).sum() == 6 and found.all()
