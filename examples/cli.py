"""LightningCLI: every callback comes from YAML, and nothing of this package from code but its import.

The extra ``cli`` installs what ``LightningCLI`` needs, and ``examples`` the data::

    pip install -c constraints.txt -e ".[examples,cli]" && python examples/cli.py fit --config examples/cli.yaml
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_optim  # noqa: F401  so that YAML may name its classes without their module

Batch = tuple[Tensor, Tensor]


class Digits(LightningDataModule):
    """scikit-learn's handwritten digits."""

    def setup(self, stage: str) -> None:
        images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        data = TensorDataset(images.float() / 16, labels)
        self.train, self.validation = random_split(data, [1200, 597], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=597)


class Classifier(LightningModule):
    """Two linear layers."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(width, 10))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.head(self.encoder(images)), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_nll", cross_entropy(self.head(self.encoder(images)), labels), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


if __name__ == "__main__":
    LightningCLI(Classifier, Digits, save_config_callback=None)  # no file is written, so it can be run again
