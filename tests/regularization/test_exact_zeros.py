"""Exact zeros: in a linear model those of scikit-learn, and in a network on real data nine weights in ten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
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

    def __init__(self, inputs: Tensor, targets: Tensor, momentum: float = 0.0) -> None:
        super().__init__()
        self.momentum = momentum
        self.linear = nn.Linear(inputs.shape[1], targets.shape[1], dtype=inputs.dtype)
        self.data = DataLoader([(inputs, targets)], batch_size=None)
        self.lr = 0.8 * len(inputs) / float(torch.linalg.matrix_norm(inputs, 2)) ** 2

    def train_dataloader(self) -> Any:
        return self.data

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return 0.5 * (self.linear(inputs) - targets).square().sum() / len(inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def diabetes() -> tuple[Tensor, Tensor]:
    """Return inputs [442, 10] and targets [442, 1]; all columns have deviation 1, and the targets a mean beside 0."""
    inputs, targets = (torch.from_numpy(array) for array in datasets.load_diabetes(return_X_y=True))
    return (inputs - inputs.mean(0)) / inputs.std(0), (targets / targets.std())[:, None]


def fitted(terms: list[Penalty | Proximal], inputs: Tensor, targets: Tensor, momentum: float = 0.0) -> nn.Linear:
    torch.manual_seed(0)
    model = Regression(inputs, targets, momentum)
    Trainer(max_steps=800, max_epochs=-1, barebones=True, callbacks=[WeightRegularization(terms)]).fit(model)
    return model.linear.requires_grad_(False)


def assert_same(
    terms: list[Penalty | Proximal], oracle: Any, inputs: Tensor, targets: Tensor, momentum: float = 0.0
) -> int:
    """Assert that a fit ends at the oracle's weights and zeros, and return the number of zeros."""
    oracle.fit(inputs.numpy(), targets.squeeze(1).numpy())
    linear = fitted(terms, inputs, targets, momentum)
    wanted = torch.from_numpy(oracle.coef_).view_as(linear.weight)
    assert torch.allclose(linear.weight, wanted, rtol=0.0, atol=1e-6)
    assert torch.equal(linear.weight == 0.0, wanted == 0.0)
    assert torch.allclose(linear.bias, torch.as_tensor(oracle.intercept_), rtol=0.0, atol=1e-6)
    return int((wanted == 0.0).sum())


@pytest.mark.parametrize(("alpha", "zeros"), [(0.02, 3), (0.1, 6), (0.3, 8)])
def test_lasso(alpha: float, zeros: int) -> None:
    oracle = linear_model.Lasso(alpha=alpha, tol=1e-12, max_iter=100_000)
    assert assert_same([ProximalL1(alpha)], oracle, *diabetes()) == zeros


def test_with_momentum_the_threshold_is_weaker_than_a_gradient() -> None:
    """Momentum m multiplies the force of the loss by 1 / (1 - m) in the long run, and not that of the threshold."""
    oracle = linear_model.Lasso(alpha=0.1, tol=1e-12, max_iter=100_000)
    assert assert_same([ProximalL1(0.1 / (1.0 - 0.6))], oracle, *diabetes(), momentum=0.6) == 6


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


# ---- a network -------------------------------------------------------------------------------------------------------


class Batches:
    """Batches of 32 in a new order in each epoch, without the overhead of a DataLoader."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels) // 32

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.labels)).split(32)[: len(self)]:
            yield self.images[chosen], self.labels[chosen]


class Digits(LightningModule):
    """Network of 64-300-100-10 for handwritten digits, with SGD whose learning rate falls to zero along a cosine."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        hidden = (nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU())
        self.layers = nn.Sequential(*hidden, nn.Linear(100, 10))
        self.images, self.labels = images, labels

    def train_dataloader(self) -> Any:
        return Batches(self.images[599:], self.labels[599:])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def checkpoint_of(path: Path, terms: list[Penalty | Proximal]) -> tuple[float, float]:
    """Train, and return of the checkpoint the accuracy on the first 599 images and the share of zero weights."""
    images, labels = (torch.from_numpy(array) for array in datasets.load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = Digits(images[order].float() / 16.0, labels[order])
    callbacks = [WeightRegularization(terms)] if terms else []
    trainer = Trainer(
        max_epochs=60, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(model)
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    model.load_state_dict(state)
    with torch.no_grad():
        right = model.layers(model.images[:599]).argmax(1) == model.labels[:599]
    weights = [tensor for tensor in state.values() if tensor.ndim == 2]
    nonzero = sum(int(torch.count_nonzero(weight)) for weight in weights)
    return float(right.float().mean()), 1.0 - nonzero / sum(weight.numel() for weight in weights)


def test_nine_weights_in_ten_are_zero_at_the_accuracy_of_the_dense_network(tmp_path: Path) -> None:
    dense, none = checkpoint_of(tmp_path / "dense.ckpt", [])
    sparse, share = checkpoint_of(tmp_path / "sparse.ckpt", [ProximalL1(3e-3)])
    assert dense > 0.97 and none == 0.0
    assert sparse > dense - 0.01 and share > 0.9
