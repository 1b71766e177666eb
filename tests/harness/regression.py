"""Networks of a hundred parameters on a fixed synthetic regression, in plain torch: every cell trains these.

The data are synthetic, since the tests compare the numbers of two programs, and not the quality of a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, mse_loss

FEATURES = 8
HIDDEN = 5  # Odd, so that two processes hold shards of different sizes.
TARGETS = 3
BATCH = 8

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Network of two layers with biases, and a parameter of one element, whose shard on the second rank is empty."""

    def __init__(self, features: int, seed: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, HIDDEN)
        self.outer = nn.Linear(HIDDEN, TARGETS)
        self.scale = nn.Parameter(torch.empty(1))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            away_from_zero_(parameter, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(gelu(self.inner(x), approximate="tanh")) * self.scale


@torch.no_grad()
def away_from_zero_(parameter: Tensor, generator: torch.Generator) -> None:
    # Rounding could flip the sign of a weight near zero in one process and not in two.
    fan_in = parameter.shape[1] if parameter.ndim > 1 else 1
    size = torch.rand(parameter.shape, generator=generator).add_(1.0).div_(2.0 * math.sqrt(fan_in))
    sign = torch.randint(0, 2, parameter.shape, generator=generator).mul_(2).sub_(1)
    parameter.copy_(size * sign)


def build_nets(count: int) -> nn.Module:
    """Make the network, or for two optimizers a list of two; the second also reads the output of the first."""
    first = Net(FEATURES, seed=1)
    if count == 1:
        return first
    return nn.ModuleList([first, Net(FEATURES + TARGETS, seed=2)])


def nets_of(net: nn.Module) -> list[nn.Module]:
    """Return the list of networks, one for each optimizer."""
    return list(net) if isinstance(net, nn.ModuleList) else [net]


def loss_of(index: int, nets: Sequence[nn.Module], batch: Batch) -> Tensor:
    """Compute the mean loss that optimizer ``index`` minimizes.

    The second loss depends on the first network without a detach, as a generator's loss on a discriminator in a GAN, so
    its backward pass leaves gradients in weights of the other optimizer.
    """
    return _losses(nets[: index + 1], batch)[index]


def validation_loss(nets: Sequence[nn.Module], batch: Batch) -> Tensor:
    """Compute the sum of the losses, which depends on every weight."""
    return torch.stack(_losses(nets, batch)).sum()


def _losses(nets: Sequence[nn.Module], batch: Batch) -> list[Tensor]:
    x, y = batch
    first = nets[0](x)
    losses = [mse_loss(first, y)]
    if len(nets) > 1:
        second = nets[1](torch.cat([x, first], dim=1))
        losses.append(mse_loss(second, y.flip(1)))
    return losses


def make_batches(count: int, seed: int) -> list[Batch]:
    """Make micro-batches of a fixed regression with noise."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(FEATURES, TARGETS, generator=torch.Generator().manual_seed(0))
    batches = []
    for _ in range(count):
        x = torch.randn(BATCH, FEATURES, generator=generator)
        y = torch.tanh(x @ mix) + 0.3 * torch.randn(BATCH, TARGETS, generator=generator)
        batches.append((x, y))
    return batches


def validation_batch() -> Batch:
    """Make a larger batch, in whose loss the roundings of single outputs average out."""
    x, y = zip(*make_batches(4, seed=20), strict=True)
    return torch.cat(x), torch.cat(y)
