"""Zeros in a checkpoint: a penalty by gradient beside a proximal step, on handwritten digits.

    python benchmarks/exact_zeros.py              # the table of the card of ProximalL1, four minutes on one core
    python benchmarks/exact_zeros.py --seeds 10

A network of 64-300-100-10 trains for 60 epochs on 1198 of scikit-learn's digits and is tested on the remaining 599,
with SGD (0.1, momentum 0.9) or Adam (0.003) and a learning rate that falls to zero along a cosine. A seed decides the
split, the first weights and the order of the batches. Zeros are counted in the weights of the saved checkpoint with
`torch.count_nonzero`. Means and standard errors over the seeds; the difference in accuracy is paired with the network
of the same seed and optimizer without a term. The strengths were tried on seed 0.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_optim import L1, Penalty, Proximal, ProximalL1, WeightRegularization

Term = Penalty | Proximal | None
Run = tuple[float, float, float]
ROWS: tuple[tuple[str, Term], ...] = (
    ("SGD", None),
    ("SGD", L1(3e-4)),
    ("SGD", ProximalL1(1e-3)),
    ("SGD", ProximalL1(3e-3)),
    ("Adam", None),
    ("Adam", ProximalL1(0.1)),
    ("Adam", ProximalL1(0.3)),
)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
}
TESTED, BATCH, EPOCHS = 599, 32, 60


class Batches:
    """Batches in a new order in each epoch, without the overhead of a DataLoader."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.labels)).split(BATCH)[: len(self)]:
            yield self.images[chosen], self.labels[chosen]


class Digits(LightningModule):
    """Network of 64-300-100-10."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.layers = nn.Sequential(
            nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )  # fmt: skip

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.layers(images), labels)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def run(optimizer: str, term: Term, seed: int) -> Run:
    """Train, save, and return the accuracy, the share of zeros and the share below 0.001 of the checkpoint."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].float() / 16.0, labels[order]
    torch.manual_seed(seed)
    train = Batches(images[TESTED:], labels[TESTED:])
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[] if term is None else [WeightRegularization(term, summary=False)],
    )  # fmt: skip
    trainer.fit(Digits(optimizer), train)
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_checkpoint(path := Path(folder) / "digits.ckpt")
        state = torch.load(path, weights_only=True)["state_dict"]
    model = Digits()
    model.load_state_dict(state)
    with torch.no_grad():
        right = (model.layers(images[:TESTED]).argmax(1) == labels[:TESTED]).float().mean()
    weights = torch.cat([tensor.flatten() for tensor in state.values() if tensor.ndim >= 2])
    zeros = 1.0 - int(torch.count_nonzero(weights)) / weights.numel()
    return float(right), zeros, float((weights.abs() < 1e-3).float().mean())


def mean(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error, in percent."""
    numbers = 100.0 * torch.tensor(values, dtype=torch.float64)
    return float(numbers.mean()), float(numbers.std()) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| optimizer, term | test accuracy, % | minus that without a term | exact zeros, % | below 0.001, % |")
    print("| --- | --- | --- | --- | --- |")
    plain: dict[str, list[float]] = {}
    for optimizer, term in ROWS:
        accuracies, zeros, small = map(list, zip(*(run(optimizer, term, seed) for seed in seeds), strict=True))
        without = plain.setdefault(optimizer, accuracies)
        told = [accuracies, [a - b for a, b in zip(accuracies, without, strict=True)], zeros, small]
        cells = ["{:.2f} ± {:.2f}".format(*mean(one)) for one in told]
        name = f"{optimizer}, `{term.brief}`" if term else optimizer
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
