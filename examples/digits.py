"""Handwritten digits, few of them and many with a wrong label: what each technique does about overfitting.

scikit-learn's digits are 1797 images of 8 x 8 pixels. A run trains on 300 of them, of whose labels one in five is
wrong, and validates on 300 others; the remaining 1197 are the test part. Validation and test labels are right.
A seed decides the split, the wrong labels, the first weights and the order of the batches. Every method is run on the
same seeds and compared with the plain model on each (a paired difference), so that the luck of the split cancels.

The plain model is a small network under Adam at its default learning rate, trained for a fixed number of epochs. A
method adds its callback to the Trainer and nothing else; the ensemble is the mean prediction of five plain models that
differ in their first weights. The number in a method was chosen by the validation part of five seeds that are not among
those reported (``--choose`` shows how); the test part chose nothing.

    python examples/digits.py                # the table, and the picture digits.png
    python examples/digits.py --seeds 20     # more seeds, smaller errors
    python examples/digits.py --choose       # how the numbers were chosen
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lightning_optim import (
    EMA,
    L2,
    SWA,
    CheckpointAveraging,
    ClipByNorm,
    EarlyStopping,
    ElasticNet,
    Ensemble,
    GradientAccumulation,
    GradientClipping,
    ScheduledDropout,
    WeightAveraging,
    WeightRegularization,
)

# ---- the methods: what is added to Trainer(callbacks=[...]) ----------------------------------------------------------


class Method(NamedTuple):
    """A callback with one number in it, and the numbers that were tried."""

    code: str
    build: Callable[[Any], L.Callback]
    number: float
    tried: tuple[float, ...]
    together: bool = True  # whether it is part of "all together"

    def __str__(self) -> str:
        return self.code.format(f"{self.number:g}")


def on_all(strength: float) -> L.Callback:
    """Return the textbook's penalty on all parameters."""
    return WeightRegularization(ElasticNet(strength, strength, on="*"))


def on_hidden(rate: float) -> L.Callback:
    """Return dropout behind both hidden layers of a model that has none."""
    return ScheduledDropout({"layers.1": rate, "layers.3": rate}, insert=True)


METHODS = [
    Method("WeightRegularization(L2({}))", lambda s: WeightRegularization(L2(s)), 1e-3, (1e-3, 3e-3, 1e-2)),
    Method('WeightRegularization(ElasticNet({0}, {0}, on="*"))', on_all, 3e-4, (3e-4, 1e-3, 3e-3), together=False),
    Method('ScheduledDropout({{"layers.*": {}}}, insert=True)', on_hidden, 0.25, (0.25, 0.5, 0.75)),
    Method("GradientClipping(ClipByNorm({}))", lambda c: GradientClipping(ClipByNorm(c)), 0.03, (0.01, 0.03, 0.1)),
    Method("GradientAccumulation({})", lambda n: GradientAccumulation(n), 4, (2, 4, 8)),
    Method('EarlyStopping("val_nll", patience={})', lambda p: EarlyStopping("val_nll", patience=p), 9, (3, 9, 27)),
    Method("WeightAveraging(EMA({}))", lambda d: WeightAveraging(EMA(d)), 0.99, (0.9, 0.97, 0.99)),
    Method(
        "WeightAveraging(SWA(), start={})", lambda s: WeightAveraging(SWA(), start=s), 0.25, (0.25, 0.5, 0.75), False
    ),
    Method("CheckpointAveraging(top={})", lambda k: CheckpointAveraging(top=k), 9, (3, 5, 9), together=False),
]
PLAIN, ALL, ENSEMBLE = "plain", "all together", "ensemble of five"
CHOOSING = range(1000, 1005)  # the seeds that chose the numbers; those reported are 0, 1, 2, ...


# ---- data ------------------------------------------------------------------------------------------------------------


class Batches:
    """Tensors in memory, cut into batches; with a seed, in a new order each time. It spares a DataLoader's overhead."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int | None = None) -> None:
        self.images, self.labels, self.size = images, labels, size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels)
        order = torch.arange(count) if self.generator is None else torch.randperm(count, generator=self.generator)
        for part in order.split(self.size):
            yield self.images[part], self.labels[part]


def digits(seed: int) -> tuple[Batches, Batches, Batches]:
    """Return the training, validation and test sets of a seed; only the training set has wrong labels."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    train, validation, test = torch.randperm(len(labels), generator=generator).split([300, 300, len(labels) - 600])
    given = labels[train].clone()
    wrong = torch.randperm(300, generator=generator)[:60]
    given[wrong] = (given[wrong] + torch.randint(1, 10, (60,), generator=generator)) % 10  # any of the nine others
    return (
        Batches(images[train], given, 30, seed),
        Batches(images[validation], labels[validation], 300),
        Batches(images[test], labels[test], len(test)),
    )


# ---- model and runs --------------------------------------------------------------------------------------------------


class Network(L.LightningModule):
    """Three linear layers. Nothing here knows of any callback."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.curve: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.layers(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        nll = cross_entropy(self.layers(images), labels)
        self.log("val_nll", nll)
        self.curve.append(nll.item())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.layers(images)
        self.log("nll", cross_entropy(logits, labels))
        self.log("accuracy", 100 * (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Run(NamedTuple):
    """What a fit came to. Test scores are those of the weights that the module holds after it."""

    nll: float
    accuracy: float
    epochs: int
    curve: list[float]  # validation NLL after each epoch, and last that of the weights held after the fit


QUIET = {
    "num_sanity_val_steps": 0,
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def train(seed: int, epochs: int, callbacks: list[L.Callback], first_weights: int = 0) -> tuple[Network, L.Trainer]:
    """Fit a network with these callbacks; the module then holds what they decided on."""
    training, validation, _ = digits(seed)
    torch.manual_seed(seed + 10_000 * first_weights)
    network = Network()
    with tempfile.TemporaryDirectory() as directory:
        if averages_files := any(isinstance(callback, CheckpointAveraging) for callback in callbacks):
            callbacks = [*callbacks, ModelCheckpoint(directory, monitor="val_nll", save_top_k=10)]
        trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=averages_files, **QUIET)
        trainer.fit(network, training, validation)
    return network, trainer


def score(seed: int, model: L.LightningModule, curve: list[float], epochs: int) -> Run:
    """Validate and test what a module holds."""
    _, validation, test = digits(seed)
    trainer = L.Trainer(enable_checkpointing=False, **QUIET)
    (held,) = trainer.validate(model, validation, verbose=False)
    (scores,) = trainer.test(model, test, verbose=False)
    return Run(scores["nll"], scores["accuracy"], epochs, [*curve, held["val_nll"]])


def run(seed: int, epochs: int, methods: list[Method]) -> tuple[Run, Network]:
    """Train and score with these methods."""
    network, trainer = train(seed, epochs, [method.build(method.number) for method in methods])
    return score(seed, network, list(network.curve), trainer.current_epoch), network


def compare(seeds: range, epochs: int) -> dict[str, list[Run]]:
    """Train the plain model, each method, all together and an ensemble of plain models, on every seed."""
    together = [method for method in METHODS if method.together]
    lists = {PLAIN: [], **{str(method): [method] for method in METHODS}, ALL: together}
    results: dict[str, list[Run]] = {name: [] for name in [*lists, ENSEMBLE]}
    with tqdm(total=len(seeds) * len(results), unit="method") as progress:
        for seed in seeds:
            members = []
            for name, methods in lists.items():
                progress.set_description(f"seed {seed}, {name.split('(')[0]}")
                outcome, network = run(seed, epochs, methods)
                results[name].append(outcome)
                members += [network] if name == PLAIN else []
                progress.update()
            progress.set_description(f"seed {seed}, {ENSEMBLE}")
            members += [train(seed, epochs, [], first_weights=index)[0] for index in range(1, 5)]
            ensemble = Ensemble(members, outputs="logits", on="layers")
            results[ENSEMBLE].append(score(seed, ensemble, [], 5 * epochs))
            progress.update()
    return results


def choose(epochs: int) -> None:
    """Print the validation NLL after the fit for each number that was tried; the least one was taken."""
    for method in METHODS:
        for number in method.tried:
            held = [run(seed, epochs, [method._replace(number=number)])[0].curve[-1] for seed in CHOOSING]
            print(f"{method._replace(number=number)!s:<55} validation NLL {np.mean(held):.4f}", flush=True)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def values(runs: list[Run], quantity: str) -> np.ndarray:
    return np.array([getattr(one, quantity) for one in runs])


def error(differences: np.ndarray) -> float:
    """Return the standard error of their mean."""
    return differences.std(ddof=1) / len(differences) ** 0.5


def table(results: dict[str, list[Run]]) -> str:
    """Return one row for each method, in Markdown."""
    rows = [["method", "test NLL", "minus plain", "accuracy, %", "minus plain", "epochs"]]
    for name, runs in results.items():
        row = [name if name in (PLAIN, ALL, ENSEMBLE) else f"`{name}`"]
        for quantity, places in (("nll", 3), ("accuracy", 1)):
            own = values(runs, quantity)
            gain = own - values(results[PLAIN], quantity)
            row.append(f"{own.mean():.{places}f} ± {own.std(ddof=1):.{places}f}")
            row.append("" if name == PLAIN else f"{gain.mean():+.{places}f} ± {error(gain):.{places}f}")
        rows.append([*row, f"{values(runs, 'epochs').mean():.0f}"])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


TITLES = {
    "nll": "test NLL minus plain (less is better)",
    "accuracy": "test accuracy minus plain, points (more is better)",
}
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"] * 2  # Okabe and Ito: for all eyes


def picture(results: dict[str, list[Run]], epochs: int, out: Path) -> None:
    """Left, validation NLL over epochs, each method against the plain model; right, paired differences on the test."""
    figure = plt.figure(figsize=(17, 9), layout="constrained")
    grid = figure.add_gridspec(2, 5)
    methods = dict(zip([name for name in results if name != PLAIN], COLOURS, strict=False))
    panels = grid[:, :3].subgridspec(4, 3).subplots(sharex=True, sharey=True)
    curves = [(name, colour) for name, colour in methods.items() if name != ENSEMBLE]
    for axes in panels.flat[len(curves) :]:
        axes.set_axis_off()
    panels[3, 1].text(0.0, 0.5, "validation NLL\ngrey: plain\nband: standard deviation over seeds", va="center")
    for axes, (name, colour) in zip(panels.flat, curves, strict=False):
        draw_curve(axes, results[PLAIN], epochs, "0.45")
        draw_curve(axes, results[name], epochs, colour)
        axes.set_title(name.replace("(", "\n(", 1), fontsize=8, color=colour)
    panels[0, 0].set(ylim=(0.4, 1.0))
    panels[1, 0].set(ylabel="validation NLL")
    panels[3, 0].set(xlabel="epoch")
    for row, (quantity, title) in enumerate(TITLES.items()):
        axes = figure.add_subplot(grid[row, 3:])
        draw_differences(axes, results, methods, quantity)
        axes.set_title(title, fontsize=10)
    axes.set_xlabel("dot: a seed; bar: mean and its standard error")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def draw_curve(axes: plt.Axes, runs: list[Run], epochs: int, colour: str) -> None:
    """Mean and standard deviation. A run that stopped goes on with the value of the weights that it holds."""
    curves = np.array([(one.curve + one.curve[-1:] * epochs)[:epochs] for one in runs])
    epoch, mean, deviation = np.arange(1, epochs + 1), curves.mean(0), curves.std(0, ddof=1)
    axes.fill_between(epoch, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
    axes.plot(epoch, mean, color=colour, linewidth=2)
    axes.grid(alpha=0.25)


def draw_differences(axes: plt.Axes, results: dict[str, list[Run]], methods: dict[str, str], quantity: str) -> None:
    """Draw a dot for each seed, and the mean with its standard error."""
    for row, (name, colour) in enumerate(methods.items()):
        gain = values(results[name], quantity) - values(results[PLAIN], quantity)
        axes.plot(gain, np.full(len(gain), row), "o", color=colour, alpha=0.35, markersize=5)
        axes.errorbar(gain.mean(), row, xerr=error(gain), fmt="D", color=colour, markersize=7, capsize=4, linewidth=2)
    axes.axvline(0, color="0.45", linewidth=2)
    axes.set_yticks(range(len(methods)), [short(name) for name in methods], fontsize=9)
    axes.invert_yaxis()
    axes.grid(alpha=0.25, axis="x")


def short(name: str) -> str:
    """Return a method's name without its numbers, and with its policy where a callback has several."""
    callback, _, rest = name.partition("(")
    policy = rest.partition("(")[0]
    return f"{callback}({policy})" if policy in ("L2", "ElasticNet", "EMA", "SWA") else callback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, at least 2")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of a run that does not stop early")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="where the picture goes")
    parser.add_argument("--choose", action="store_true", help="show how the methods' numbers were chosen, and end")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a standard deviation needs at least two seeds")

    torch.set_num_threads(1)  # the network is so small that a second thread only waits
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")

    if arguments.choose:
        choose(arguments.epochs)
        return
    begin = time.perf_counter()
    results = compare(range(arguments.seeds), arguments.epochs)
    picture(results, arguments.epochs, arguments.out)
    print(f"\nmean ± standard deviation over {arguments.seeds} seeds; differences are paired: mean ± standard error\n")
    print(table(results))
    print(f"\n{time.perf_counter() - begin:.0f} s; the picture is in {arguments.out}")


if __name__ == "__main__":
    main()
