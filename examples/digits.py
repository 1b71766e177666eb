"""Handwritten digits, few of them and many with a wrong label: what each technique does about overfitting.

scikit-learn's digits are 1797 images of 8 x 8 pixels. A run trains on 300 of them, of which one label in five is wrong,
and validates on 300 others; the remaining 1197 are the test set. Validation and test labels are right. A seed decides
the split, the wrong labels, the first weights and the order of the batches. Every method is run on the same seeds and
compared with the plain model on each (a paired difference), so that the luck of the split cancels.

The plain model is a small network, trained with Adam at its default learning rate for a fixed number of epochs. It has
two rows: its weights after the last epoch, and its best checkpoint, which is that of the epoch with the least
validation NLL. A checkpoint costs nothing, so the second is the fair bar. A method adds its callback to the Trainer and
changes nothing else. An ensemble is the mean prediction of five plain models that differ in their first weights.

The number in each callback was chosen on the validation sets of five seeds that are not among those reported. For "all
together" the numbers were chosen as a whole: each is the best one beside the others. ``--choose`` shows both. Patience
was not chosen like this, since a longer one is never worse in validation. No test set chose anything.

    python examples/digits.py                # the table, row by row, and the pictures digits.png and digits-curves.png
    python examples/digits.py --seeds 20     # more seeds, smaller errors
    python examples/digits.py --choose       # how the numbers were chosen
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lightning_optim
from lightning_optim import CheckpointAveraging, Ensemble

# ---- the methods: what is added to Trainer(callbacks=[...]) ----------------------------------------------------------


class Method(NamedTuple):
    """A callback with one number in it, and the numbers that were tried."""

    code: str
    number: float  # by itself
    tried: tuple[float, ...]
    together: float | None = None  # the number in "all together"; None: it is not part of it

    def __str__(self) -> str:
        return self.code.format(f"{self.number:g}")

    def build(self) -> L.Callback:
        """Evaluate the code, so that what the table shows is what was run."""
        return eval(str(self), vars(lightning_optim))


METHODS = [
    Method("WeightRegularization(L2({}))", 1e-3, (1e-4, 3e-4, 1e-3, 3e-3), 1e-4),
    Method('WeightRegularization(ElasticNet({0}, {0}, on="*"))', 3e-4, (1e-4, 3e-4, 1e-3)),
    Method('ScheduledDropout({{"layers.[02]": {}}}, insert=True)', 0.25, (0.1, 0.25, 0.5), 0.5),
    Method("GradientClipping(ClipByNorm({}))", 0.03, (0.01, 0.03, 0.1, 1.0), 1.0),
    Method("GradientAccumulation({})", 4, (2, 4, 8), 2),
    Method('EarlyStopping("val_nll", patience={})', 9, (), 9),  # more is never worse in validation, and costs epochs
    Method("WeightAveraging(EMA({}))", 0.98, (0.9, 0.95, 0.98), 0.98),
    Method("WeightAveraging(SWA(), start={})", 0.25, (0.25, 0.5, 0.75)),
    Method("CheckpointAveraging(top={})", 9, (3, 5, 9)),
]
LAST, BEST, ALL = "plain, last epoch", "plain, best checkpoint", "all together"
ENSEMBLES = ("ensemble of five, last epochs", "ensemble of five, best checkpoints")
LONG = 4  # "all together" has up to four times the epochs, and EarlyStopping ends it
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


def train(seed: int, callbacks: list[L.Callback], epochs: int, first_weights: int = 0) -> tuple[Network, L.Trainer]:
    """Fit a network with these callbacks; the module then holds what they decided on."""
    training, validation, _ = digits(seed)
    torch.manual_seed(seed + 10_000 * first_weights)
    network = Network()
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=saves(callbacks), **QUIET)
    trainer.fit(network, training, validation)
    return network, trainer


def saves(callbacks: list[L.Callback]) -> bool:
    return any(isinstance(callback, ModelCheckpoint) for callback in callbacks)


def score(seed: int, model: L.LightningModule, curve: list[float], epochs: int) -> Run:
    """Validate and test what a module holds."""
    _, validation, test = digits(seed)
    trainer = L.Trainer(enable_checkpointing=False, **QUIET)
    (held,) = trainer.validate(model, validation, verbose=False)
    (scores,) = trainer.test(model, test, verbose=False)
    return Run(scores["nll"], scores["accuracy"], epochs, [*curve, held["val_nll"]])


def run(seed: int, callbacks: list[L.Callback], epochs: int) -> Run:
    """Train and score with these callbacks."""
    with tempfile.TemporaryDirectory() as directory:
        if any(isinstance(callback, CheckpointAveraging) for callback in callbacks):
            callbacks = [*callbacks, ModelCheckpoint(directory, monitor="val_nll", save_top_k=10)]
        network, trainer = train(seed, callbacks, epochs)
    return score(seed, network, network.curve, trainer.current_epoch)


def run_plain(seed: int, epochs: int, first_weights: int) -> tuple[Network, Network]:
    """Return a plain model after its last epoch, and the same run's best checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        best = ModelCheckpoint(directory, monitor="val_nll")
        last, _ = train(seed, [best], epochs, first_weights)
        return last, Network.load_from_checkpoint(best.best_model_path)


def together(methods: list[Method]) -> list[Method]:
    return [method._replace(number=method.together) for method in methods if method.together is not None]


def build(methods: list[Method]) -> list[L.Callback]:
    return [method.build() for method in methods]


def rows(seeds: range, epochs: int) -> Iterator[tuple[str, list[Run]]]:
    """Train and score on every seed: the plain model, its best checkpoint, each method, all together, ensembles."""
    plain = [run_plain(seed, epochs, 0) for seed in seeds]
    yield LAST, [score(seed, last, last.curve, epochs) for seed, (last, _) in zip(seeds, plain, strict=True)]
    yield BEST, [score(seed, best, [], epochs) for seed, (_, best) in zip(seeds, plain, strict=True)]
    for method in METHODS:
        yield str(method), [run(seed, build([method]), epochs) for seed in seeds]
    yield ALL, [run(seed, build(together(METHODS)), LONG * epochs) for seed in seeds]
    members = [
        [pair, *(run_plain(seed, epochs, i) for i in range(1, 5))] for seed, pair in zip(seeds, plain, strict=True)
    ]
    for which, name in enumerate(ENSEMBLES):
        ensembles = [Ensemble([pair[which] for pair in five], outputs="logits", on="layers") for five in members]
        yield name, [score(seed, ensemble, [], 5 * epochs) for seed, ensemble in zip(seeds, ensembles, strict=True)]


def choose(epochs: int) -> None:
    """Print the validation NLL after the fit for each number that was tried; the least one was taken."""
    print("one callback by itself")
    for method in METHODS:
        for number in method.tried:
            print_choice(method, number, number == method.number, [method._replace(together=number)], epochs)
    print("\nall together, each number beside the others as they are")
    for method in METHODS:
        for number in method.tried if method.together is not None else ():
            others = [one._replace(together=number) if one is method else one for one in METHODS]
            print_choice(method, number, number == method.together, others, LONG * epochs)


def print_choice(method: Method, number: float, taken: bool, methods: list[Method], epochs: int) -> None:
    held = [run(seed, build(together(methods)), epochs).curve[-1] for seed in CHOOSING]
    name = str(method._replace(number=number))
    print(f"{name:<57} validation NLL {np.mean(held):.4f}{' *' if taken else ''}", flush=True)


# ---- the table -------------------------------------------------------------------------------------------------------

HEADER = ["method", "test NLL", "vs last", "vs best", "accuracy, %", "vs last", "vs best", "epochs"]
WIDTHS = [max(len(name) + 2 for name in map(str, METHODS)), 8, 14, 14, 11, 11, 11, 6]


def values(runs: list[Run], quantity: str) -> np.ndarray:
    return np.array([getattr(one, quantity) for one in runs])


def error(differences: np.ndarray) -> float:
    """Return the standard error of their mean."""
    return differences.std(ddof=1) / len(differences) ** 0.5


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True))} |"


def table_row(name: str, results: dict[str, list[Run]]) -> str:
    """Return one row in Markdown: means over the seeds, and paired differences from the plain model."""
    cells = [f"`{name}`" if "(" in name else name]
    for quantity, places in (("nll", 3), ("accuracy", 1)):
        own = values(results[name], quantity)
        cells.append(f"{own.mean():.{places}f}")
        for plain in (LAST, BEST):
            gain = own - values(results.get(plain, results[name]), quantity)
            same = name == plain or plain not in results
            cells.append("" if same else f"{gain.mean():+.{places}f} ± {error(gain):.{places}f}")
    return line([*cells, f"{values(results[name], 'epochs').mean():.0f}"])


# ---- the pictures ----------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, PURPLE, OCHRE, TEAL = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#B37700", "#117799"
COLOURS = [BLUE, ORANGE, GREEN, PURPLE, OCHRE, TEAL] * 3  # dark enough on white, also for the colour-blind
PLAIN_COLOUR = "black"


def picture_of_differences(results: dict[str, list[Run]], out: Path) -> None:
    """Draw the test scores of each method minus those of the plain model's best checkpoint, seed by seed."""
    names = [name for name in results if name != BEST]
    titles = {"nll": "test NLL (less is better)", "accuracy": "test accuracy, points (more is better)"}
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(9, 5), layout="constrained")
    for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
        for row, (name, colour) in enumerate(zip(names, [PLAIN_COLOUR, *COLOURS], strict=False)):
            gain = values(results[name], quantity) - values(results[BEST], quantity)
            axes.plot(gain, np.full(len(gain), row), "o", color=colour, alpha=0.3, markersize=6, markeredgewidth=0)
            axes.errorbar(gain.mean(), row, xerr=error(gain), fmt="D", color=colour, markersize=5, capsize=3)
        axes.axvline(0, color=PLAIN_COLOUR, linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(names)), [short(name) for name in names])
    panels[0].invert_yaxis()
    figure.supxlabel(f"difference from {BEST} (line at 0); dot: a seed; diamond: mean ± standard error", fontsize=9)
    save(figure, out)


def picture_of_curves(results: dict[str, list[Run]], epochs: int, out: Path) -> None:
    """Draw the validation NLL over epochs, each method in a panel of its own, with the plain model over it."""
    names = [name for name in results if name not in (LAST, BEST, *ENSEMBLES)]
    figure, grid = plt.subplots(-(-(len(names) + 1) // 4), 4, sharey=True, figsize=(9, 6.6), layout="constrained")
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    best = np.mean([one.curve[-1] for one in results[BEST]])
    for axes, name, colour in zip(grid.flat, names, COLOURS, strict=False):
        runs, length = results[name], max([epochs, *(one.epochs for one in results[name])])
        draw_curve(axes, runs, length, colour, linewidth=4, alpha=0.55)
        draw_curve(axes, results[LAST], epochs, PLAIN_COLOUR, linewidth=1.2)
        axes.axhline(best, color=PLAIN_COLOUR, linewidth=1, linestyle=":")
        axes.plot(length, np.mean([one.curve[-1] for one in runs]), "D", color=colour, clip_on=False, zorder=5)
        axes.set_title(short(name).replace("(", "\n("), fontsize=9, color=colour)
        axes.set(ylim=(0.4, 1.0), xlim=(0, length))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    grid.flat[len(names)].legend(handles=legend(), loc="center left", frameon=False, fontsize=9, labelspacing=0.8)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("validation NLL, mean over seeds", fontsize=9)
    save(figure, out)


def draw_curve(axes: plt.Axes, runs: list[Run], length: int, colour: str, **style: float) -> None:
    """Draw the mean over seeds. A run that stopped goes on with the value of the weights that it holds."""
    curves = np.array([(one.curve[:-1] + one.curve[-1:] * length)[:length] for one in runs])
    axes.plot(np.arange(1, length + 1), curves.mean(0), color=colour, solid_capstyle="round", **style)


def legend() -> list[Line2D]:
    """Return what the lines of every panel mean."""
    method = {"color": BLUE, "alpha": 0.55}
    return [
        Line2D([], [], linewidth=4, label="with the method", **method),
        Line2D([], [], linestyle="", marker="D", color=BLUE, label="weights after the fit"),
        Line2D([], [], linewidth=1.2, color=PLAIN_COLOUR, label="plain"),
        Line2D([], [], linewidth=1, linestyle=":", color=PLAIN_COLOUR, label="plain, best checkpoint"),
    ]


def short(name: str) -> str:
    """Return a method's name without its numbers, and with its policy where a callback has several."""
    callback, _, rest = name.partition("(")
    policy = rest.partition("(")[0]
    return f"{callback}({policy})" if policy in ("L2", "ElasticNet", "EMA", "SWA") else callback


def save(figure: plt.Figure, out: Path) -> None:
    figure.savefig(out, dpi=200, facecolor="white")  # white, so that it can also be read on a dark page
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, at least 2")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of a run that does not stop early")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="where the pictures go")
    parser.add_argument("--choose", action="store_true", help="show how the callbacks' numbers were chosen, and end")
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
    print(
        f"means over {arguments.seeds} seeds, and paired differences with their standard errors, from the plain model:"
    )
    print("vs last: from its weights after the last epoch; vs best: from its best checkpoint, which is the fair bar\n")
    print(line(HEADER), line(["-" * width for width in WIDTHS]), sep="\n", flush=True)
    results: dict[str, list[Run]] = {}
    for name, runs in rows(range(arguments.seeds), arguments.epochs):
        results[name] = runs
        print(table_row(name, results), flush=True)
    print(f"\n{ALL}: {', '.join(map(str, together(METHODS)))}; at most {LONG * arguments.epochs} epochs")
    curves = arguments.out.with_stem(f"{arguments.out.stem}-curves")
    picture_of_differences(results, arguments.out)
    picture_of_curves(results, arguments.epochs, curves)
    print(f"\n{time.perf_counter() - begin:.0f} s; the pictures are in {arguments.out} and {curves}")


if __name__ == "__main__":
    main()
