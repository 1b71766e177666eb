"""Compare cautious weight decay with plain decoupled decay over the strength.

    python benchmarks/cautious_decay.py        # about three minutes of one core

A network of 64-128-128-10 trains on 300 of scikit-learn's digits, of which a fifth have a wrong label, for 600 steps
of Adam with a learning rate that falls from 0.003 to zero along a line. Every strength has the same splits, first
weights and batches. Shown are differences to the network without decay, of the last weights on the test set: the mean
over the seeds, and its standard error.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_optim import WeightDecay

TRAIN, STEPS, BATCH, LR = 300, 600, 30, 3e-3
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)


def scores(seed: int, decay: WeightDecay | None) -> tuple[float, float]:
    """Train with one seed; return test NLL and test accuracy in percent."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = images.float() / 16.0
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:TRAIN], order[TRAIN:]
    noisy = labels.clone()
    wrong = train[torch.rand(TRAIN, generator=generator) < 0.2]
    noisy[wrong] = torch.randint(0, 10, (len(wrong),), generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), LR)
    weights: list[Tensor] = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    for step in range(STEPS):
        lr = optimizer.param_groups[0]["lr"] = LR * (1.0 - step / STEPS)
        batch = train[torch.randint(0, TRAIN, (BATCH,), generator=generator)]
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), noisy[batch]).backward()
        if decay is not None:
            decay.before_step_(weights, lr=lr)
        optimizer.step()
        if decay is not None:
            decay.after_step_()
    with torch.no_grad():
        outputs = model(images[test])
    nll = cross_entropy(outputs, labels[test]).item()
    return nll, 100.0 * (outputs.argmax(1) == labels[test]).double().mean().item()


def mean_and_error(differences: list[float]) -> tuple[float, float]:
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12, help="number of seeds (default: 12)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(given.seeds)
    without = [scores(seed, None) for seed in seeds]
    nll, accuracy = (statistics.mean(values) for values in zip(*without, strict=True))
    print(f"without decay: test NLL {nll:.3f}, accuracy {accuracy:.1f} %, {given.seeds} seeds\n")
    print("| strength | `WeightDecay(s)`: NLL | accuracy | `WeightDecay(s, cautious=True)`: NLL | accuracy |")
    print("| ---: | --- | --- | --- | --- |")
    for strength in STRENGTHS:
        cells = []
        for cautious in (False, True):
            found = [scores(seed, WeightDecay(strength, cautious)) for seed in seeds]
            for place, digits in ((0, 3), (1, 1)):
                mean, error = mean_and_error([a[place] - b[place] for a, b in zip(found, without, strict=True)])
                cells.append(f"{mean:+.{digits}f} ± {error:.{digits}f}")
        print(f"| {strength:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
