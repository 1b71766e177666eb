"""A GAN on handwritten digits: two optimizers with clipping, accumulation, a gradient penalty and an EMA.

Manual optimization needs one mixin and one call, ``self.optimize(loss, optimizer)``; the callbacks do the rest, for
each optimizer by itself. The discriminator's penalty on its gradients at the real data (R1, arXiv:1801.04406) needs the
batch, so it is a term of ``RegularizationMixin``. Real data from scikit-learn, nothing is downloaded::

    pip install -c constraints.txt -e ".[examples]" && python examples/mixins.py
"""

from __future__ import annotations

import argparse
import logging
import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import (
    EMA,
    GradientAccumulation,
    GradientClipping,
    ManualOptimizationMixin,
    RegularizationMixin,
    WeightAveraging,
)

NOISE = 32
CHECK = 1000  # samples for the energy distance


class GAN(ManualOptimizationMixin, RegularizationMixin, LightningModule):
    """Digits of 8 x 8 pixels in [-1, 1] from noise."""

    def __init__(self, real: Tensor) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 128),
            nn.LeakyReLU(0.2),
            nn.Linear(128, 128),
            nn.LeakyReLU(0.2),
            nn.Linear(128, 64),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
        )
        self.real = real[:CHECK]
        self.noise = torch.randn(CHECK, NOISE, generator=torch.Generator().manual_seed(0))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        (real,) = batch
        fake = self.generator(torch.randn(len(real), NOISE))
        self.optimize(softplus(-self.discriminator(fake)).mean(), generator)
        adversarial = softplus(self.discriminator(fake.detach())).mean() + softplus(-self.discriminator(real)).mean()
        self.optimize(adversarial + self.regularization_loss(real, None), discriminator)

    def regularization(self, batch: Tensor, outputs: None) -> Tensor:
        """R1: half the mean squared norm of the discriminator's gradient at the real data."""
        real = batch.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.discriminator(real).sum(), real, create_graph=True)
        return 0.5 * gradient.square().sum(1).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("energy_distance", energy_distance(self.generator(self.noise), self.real), prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        nets = (self.generator, self.discriminator)
        return [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.99)) for net in nets]


def energy_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the energy distance of two samples: ``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, 0 for equal distributions."""
    return 2 * torch.cdist(one, other).mean() - torch.cdist(one, one).mean() - torch.cdist(other, other).mean()


def draw(rows: dict[str, Tensor], path: str) -> None:
    """One row of digits for each entry."""
    figure, axes = plt.subplots(len(rows), 12, figsize=(9, 1.0 * len(rows)))
    for (label, images), line in zip(rows.items(), axes, strict=True):
        for image, axis in zip(images, line, strict=False):
            axis.imshow(image.view(8, 8), cmap="gray_r", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, compare the raw generator with the averaged one, and draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", default="gan.png")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)  # tips; the summary stays
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)

    real = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    model = GAN(real)
    average = WeightAveraging(EMA(0.99), apply_at_end=False)
    trainer = Trainer(
        max_epochs=arguments.epochs,
        check_val_every_n_epoch=max(1, arguments.epochs // 6),
        callbacks=[average, GradientClipping(1.0), GradientAccumulation(2)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(
        model, DataLoader(TensorDataset(real), batch_size=32, shuffle=True), DataLoader(TensorDataset(real[:1]))
    )

    with torch.no_grad():
        raw = model.generator(model.noise)
        with average.averaged_weights(model):
            averaged = model.generator(model.noise)
    print(f"{average.steps[0]} steps of the generator, {average.steps[1]} of the discriminator")
    print(f"energy distance to the data, less is better: raw {energy_distance(raw, model.real):.4f},", end=" ")
    print(f"averaged {energy_distance(averaged, model.real):.4f}")
    draw({"data": model.real, "raw": raw, "averaged": averaged}, arguments.out)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
