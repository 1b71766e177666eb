"""Define small classifiers whose steps call a submodule, their own forward, or both; and data for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from tests.lightning import LightningModule, Trainer

FEATURES, CLASSES = 6, 3
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Classifier(LightningModule):
    """Validate with ``self.net``, test with ``self``; has BatchNorm, dropout, metrics, hooks and a buffer."""

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.5), nn.Linear(width, CLASSES)
            )
            nn.init.normal_(self.net[4].weight, std=2.0)
            nn.init.uniform_(self.net[1].running_var, 0.5, 2.0)
        self.metrics = MetricCollection(
            [MulticlassAccuracy(CLASSES, average="micro"), MulticlassCalibrationError(CLASSES)]
        )
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.register_buffer("weight", torch.ones(CLASSES), persistent=False)
        self.seen: list[float] = []
        self.ended: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(self.net(batch[0]), batch[1])

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(self(batch[0]), batch[1])

    def _evaluate(self, logits: Tensor, labels: Tensor) -> None:
        loss = cross_entropy(logits, labels, self.weight)
        self.metrics.update(logits, labels)
        self.accuracy(logits, labels)
        self.log("nll", loss)
        self.log("accuracy", self.accuracy)
        self.log_dict(self.metrics)
        self.seen.append(float(loss))

    def on_validation_epoch_end(self) -> None:
        self.ended.append("validation")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(count: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(x, (x[:, :CLASSES] + 0.5 * torch.randn(count, CLASSES, generator=generator)).argmax(1))


def loader(batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=batch_size)


def members() -> list[Classifier]:
    """Make three members of two architectures, in the modes in which a fit may leave them."""
    built = [Classifier(8, seed=1), Classifier(12, seed=2), Classifier(8, seed=3)]
    built[1].eval()
    return built


def trainer(**changes: Any) -> Trainer:
    return Trainer(**{**QUIET, **changes})


@torch.no_grad()
def mean_probabilities(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Average the probabilities of each model alone in eval mode, in float64."""
    total = torch.zeros(())
    for model in models:
        modes = {module: module.training for module in model.modules()}
        total = total + torch.softmax(model.eval()(x).double(), 1)
        for module, mode in modes.items():
            module.training = mode
    return total / len(models)
