"""How strong a penalty, dropout and weight decay should be for how much data.

    python benchmarks/strength_by_data.py                                  # the table, eight minutes of one core
    python benchmarks/strength_by_data.py --plot docs/strength-by-data.png --json strength.json

Two data sets of scikit-learn, digits (1797 images, ten classes) and breast cancer (569 patients, two classes), are cut
by a seed into a training, a validation and a test set. A network with two hidden layers of 64 units trains on the first
n samples of the training set with Adam at 0.001 for the same number of steps, whatever n is. So with few samples it
sees each one more often, as a user who trains until the loss is small.

Every technique is run with each of its strengths, on the same splits, first weights and batches. The best strength,
which may be none, is the one with the least validation NLL in the mean over the seeds; what it gains is told by the
test sets, as the paired difference to the network without it, with its standard error over the seeds. There are two
tables: of the weights after the last step, and of those of the best checkpoint, by validation NLL every 40 steps, with
and without the technique. A line below says how much is gained with the next weaker and the next stronger strength, a
factor of about three.

All seeds are trained at once: weights, inputs and masks have a dimension that numbers the seeds, and each operation is
done for each of them by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_optim import L2, WeightDecay

HIDDEN, BATCH, LR, EVERY = 64, 32, 1e-3, 40


@dataclass(frozen=True)
class Data:
    """Data set: how to load it, and how it is cut; what is left is the test set."""

    load: Callable[..., Any]
    classes: int
    sizes: tuple[int, ...]
    validation: int


DATA = {
    "digits": Data(load_digits, 10, (50, 100, 200, 400, 800), 300),
    "breast cancer": Data(load_breast_cancer, 2, (20, 40, 80, 160, 320), 100),
}
TECHNIQUES: dict[str, tuple[float, ...]] = {
    "L2": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "Dropout": (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9),
    "WeightDecay": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
}


@dataclass(frozen=True)
class Scores:
    """NLL of each seed on the validation and on the test set."""

    validation: list[float]
    test: list[float]


@dataclass(frozen=True)
class Result:
    """NLL of each seed in the training with one strength: of the last weights, and of the best checkpoint."""

    last: Scores
    best: Scores


@dataclass(frozen=True)
class Row:
    """What a technique does with one number of samples. The gain is the test NLL without it minus that with it."""

    weights: Literal["last", "best"]  # after the last step, or those of the best checkpoint, with and without it
    data: str
    samples: int
    technique: str
    strength: float  # the best one; 0 if the network without the technique is better than with any strength
    strongest: bool  # no stronger one was tried
    by_seed: list[float]  # the best strength of each seed alone
    without: float
    gain: tuple[float, float]  # mean and standard error
    beside: tuple[float, float]  # gains of the next weaker and the next stronger strength


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Inputs [seeds, samples, features] and labels [seeds, samples] of the three sets."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split(data: Data, samples: int, seeds: int) -> Split:
    """Cut a data set for each seed; inputs are standardized with the mean and the deviation of the training set."""
    inputs, labels = (torch.from_numpy(array) for array in data.load(return_X_y=True))
    parts: list[list[tuple[Tensor, Tensor]]] = []
    for seed in range(seeds):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        largest, edge = max(data.sizes), max(data.sizes) + data.validation
        chosen = (order[:samples], order[largest:edge], order[edge:])  # smaller training sets are parts of larger ones
        x = inputs[chosen[0]]
        mean, deviation = x.mean(0), x.std(0)
        deviation[deviation < 1e-6] = inputs.std()  # a pixel that is always 0
        parts.append([(((inputs[one] - mean) / deviation).float(), labels[one].long()) for one in chosen])
    sets = [tuple(torch.stack(tensors) for tensors in zip(*one, strict=True)) for one in zip(*parts, strict=True)]
    return Split(*sets)  # type: ignore[arg-type]


def batches(samples: int, steps: int, seeds: int) -> Tensor:
    """Return the indices of all batches, [steps, seeds, batch]: one random order of the samples after the other."""
    rounds = math.ceil(steps * BATCH / samples)
    drawn = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(1000 + seed)
        orders = torch.cat([torch.randperm(samples, generator=generator) for _ in range(rounds)])
        drawn.append(orders[: steps * BATCH].view(steps, BATCH))
    return torch.stack(drawn, dim=1)


# ---- training --------------------------------------------------------------------------------------------------------


class Networks(nn.Module):
    """One network for each seed: three layers, with dropout after the hidden ones."""

    def __init__(self, features: int, classes: int, seeds: int, rate: float) -> None:
        super().__init__()
        layers = [first_layers((features, HIDDEN, HIDDEN, classes), seed) for seed in range(seeds)]
        self.weights = nn.ParameterList(torch.stack([m.weight for m in same]) for same in zip(*layers, strict=True))
        self.biases = nn.ParameterList(torch.stack([m.bias[None] for m in same]) for same in zip(*layers, strict=True))
        self.dropout = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x if index == 0 else self.dropout(x.relu()), weight.mT)
        return x


def first_layers(sizes: Sequence[int], seed: int) -> list[nn.Linear]:
    torch.manual_seed(seed)
    return [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean NLL of each seed."""
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def train(data: Data, split: Split, indices: Tensor, technique: str, strength: float) -> Result:
    """Train the networks of all seeds with one technique, and return their NLL."""
    seeds, _, features = split.train[0].shape
    networks = Networks(features, data.classes, seeds, strength if technique == "Dropout" else 0.0)
    optimizer = torch.optim.Adam(networks.parameters(), lr=LR, fused=True)
    penalty = L2(strength if technique == "L2" else 0.0)
    decay = WeightDecay(strength if technique == "WeightDecay" else 0.0)
    weights, numbers = list(networks.weights), torch.arange(seeds)[:, None]
    least, best = torch.full((seeds,), math.inf), torch.zeros(seeds)
    for step, chosen in enumerate(indices):
        networks.train()
        optimizer.zero_grad()
        nll(networks(split.train[0][numbers, chosen]), split.train[1][numbers, chosen]).sum().backward()
        penalty.add_grad_(weights, [weight.grad for weight in weights])  # type: ignore[misc]
        decay.before_step_(weights, lr=LR)
        optimizer.step()
        decay.after_step_()
        if (step + 1) % EVERY == 0 or step + 1 == len(indices):
            validation, test = evaluate(networks, split)
            best = torch.where(validation < least, test, best)
            least = torch.minimum(validation, least)
    return Result(Scores(validation.tolist(), test.tolist()), Scores(least.tolist(), best.tolist()))


@torch.no_grad()
def evaluate(networks: Networks, split: Split) -> tuple[Tensor, Tensor]:
    networks.eval()
    validation, test = (nll(networks(inputs), labels) for inputs, labels in (split.validation, split.test))
    return validation, test


# ---- what is told ----------------------------------------------------------------------------------------------------


def paired(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """Return the mean of the differences, and its standard error."""
    difference = torch.tensor(left, dtype=torch.float64) - torch.tensor(right, dtype=torch.float64)
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))


def row(
    weights: Literal["last", "best"], name: str, samples: int, technique: str, plain: Result, tried: dict[float, Result]
) -> Row:
    strengths, without = list(tried), getattr(plain, weights).test
    scores = [getattr(result, weights) for result in tried.values()]
    validation = torch.tensor([one.validation for one in scores])  # [strengths, seeds]
    place = int(validation.mean(1).argmin())
    gains = [paired(without, one.test) for one in scores]
    return Row(
        weights, name, samples, technique, strengths[place], place == len(strengths) - 1,
        [strengths[index] for index in validation.argmin(0).tolist()], sum(without) / len(without),
        gains[place], (gains[max(place - 1, 0)][0], gains[min(place + 1, len(gains) - 1)][0]),
    )  # fmt: skip


def tell(rows: Sequence[Row]) -> str:
    """Return the table in Markdown: best strength and gain; a star says that no stronger one was tried."""
    lines = [
        f"| data, samples | test NLL without | {' | '.join(f'`{one}`' for one in TECHNIQUES)} |",
        f"| --- | --- |{' --- |' * len(TECHNIQUES)}",
    ]
    for name, samples in dict.fromkeys((one.data, one.samples) for one in rows):
        here = [one for one in rows if (one.data, one.samples) == (name, samples)]
        told = [
            f"{one.strength:g}{'*' * one.strongest}: {one.gain[0]:.3f} ± {one.gain[1]:.3f}" if one.strength else "none"
            for one in here
        ]
        lines.append(f"| {name}, {samples} | {here[0].without:.3f} | {' | '.join(told)} |")
    lines.append("")
    for technique in TECHNIQUES:
        gains = [(one.gain[0], *one.beside) for one in rows if one.technique == technique and one.strength]
        means = [f"{sum(each) / len(each):.3f}" for each in zip(*gains, strict=True)]
        lines.append(f"{technique}, mean gain with the best, the next weaker, the next stronger: {', '.join(means)}")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the best strengths, and what they gain, over the number of samples: a column for each technique."""
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, len(TECHNIQUES), figsize=(14, 8), sharex=True, layout="constrained")
    for column, technique in enumerate(TECHNIQUES):
        upper, lower = axes[:, column]
        for color, marker, name in zip(("#0072b2", "#d55e00"), "os", DATA, strict=True):
            ours = [one for one in rows if (one.data, one.technique) == (name, technique)]
            samples = [one.samples for one in ours]
            upper.plot(samples, [one.strength for one in ours], color=color, marker=marker, markersize=9, label=name)
            for one in ours:
                upper.plot([one.samples] * len(one.by_seed), one.by_seed, ".", color=color, alpha=0.35)
            means, errors = zip(*(one.gain for one in ours), strict=True)
            lower.errorbar(samples, means, errors, color=color, marker=marker, markersize=9, capsize=4, label=name)
        upper.set(xscale="log", title=technique, ylabel="best strength" if not column else None)
        if technique != "Dropout":
            upper.set_yscale("log")
        lower.axhline(0.0, color="grey", linewidth=1)
        lower.set(xlabel="training samples", ylabel="gain in test NLL" if not column else None)
        ticks = sorted({one.samples for one in rows})[::2]
        lower.set_xticks(ticks, [str(tick) for tick in ticks])
        lower.minorticks_off()
    limits = [limit for lower in axes[1] for limit in lower.get_ylim()]
    for lower in axes[1]:
        lower.set_ylim(min(limits), max(limits))
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write all results")
    parser.add_argument("--plot", type=Path, help="draw the picture")
    parser.add_argument("--data", choices=DATA, nargs="*", default=list(DATA))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    rows: list[Row] = []
    kept: list[dict[str, Any]] = []
    for name in arguments.data:
        for samples in DATA[name].sizes:
            cut = split(DATA[name], samples, arguments.seeds)
            indices = batches(samples, arguments.steps, arguments.seeds)
            plain = train(DATA[name], cut, indices, "none", 0.0)
            for technique, strengths in TECHNIQUES.items():
                tried = {0.0: plain} | {one: train(DATA[name], cut, indices, technique, one) for one in strengths}
                rows += [row(weights, name, samples, technique, plain, tried) for weights in ("last", "best")]
                kept.append({"data": name, "samples": samples, "technique": technique, "without": asdict(plain)})
                kept[-1]["with"] = {strength: asdict(result) for strength, result in tried.items()}
            print(f"{name}, {samples} samples: {time.process_time() - begun:.0f} s of one core", flush=True)
    for weights, words in (("last", "after the last step"), ("best", "at the best checkpoint, with and without")):
        print(f"\n{words}:\n\n{tell([one for one in rows if one.weights == weights])}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": [asdict(one) for one in rows], "results": kept}))
    if arguments.plot:
        draw([one for one in rows if one.weights == "last"], arguments.plot)


if __name__ == "__main__":
    main()
