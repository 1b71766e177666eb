"""List the techniques: an entry for each, with its reference formula, for all tests that run for every entry."""

from __future__ import annotations

import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import lightning_optim as lo
from lightning_optim.base import local_shards, per_weight, shard_of, total_norm, whole
from tests.harness import averaging_formulas as averaging
from tests.harness import gradient_formulas as gradients
from tests.harness import loss_formulas as losses
from tests.harness import regularization_formulas as regularization
from tests.harness import run
from tests.harness import stopping_formulas as stopping
from tests.harness.cells import CELLS, EPOCHS, Cell, orthogonal_array
from tests.harness.dropout_formulas import Dropout, WeightDropout, fixed
from tests.harness.reference_loop import Chain, Formula, Outcome
from tests.harness.schedule_formulas import Scheduled, cosine, exponential, linear
from tests.lightning import Callback, LightningModule, ModelCheckpoint, Trainer

Acts = Literal["gradients", "weights", "windows", "evaluation", "run", "end", "nothing"]


def _plain(cell: Cell) -> Formula:
    return Formula()


@dataclass(frozen=True)
class Entry:
    """Technique under test.

    Attributes:
        name: Name in the ids of tests.
        acts: The quantity that it changes, which decides where a cell must show its effect.
        callbacks: Makes new callbacks, without the accumulation of the cell, which :meth:`all_callbacks` adds.
        formula: Makes the reference formula.
        without: Makes the formula that the effect is measured against; default: the plain model.
        accumulates: True if the callbacks accumulate, so that :meth:`all_callbacks` adds nothing.
        scores: Values of ``val_score``, one for each validation; an epoch has two.
        epochs: Number of epochs.
        cells: Cells of the normal test run: ``"array"``, nine that hold every pair of levels; ``"all"``, for one entry
            of each slot; ``"strategies"``, one for each strategy, for techniques that read no tensor of the model.
            ``pytest --matrix`` runs all cells for every entry.
    """

    name: str
    acts: Acts
    callbacks: Callable[[Cell], list[Callback]]
    formula: Callable[[Cell], Formula]
    without: Callable[[Cell], Formula] = _plain
    accumulates: bool = False
    scores: tuple[float, ...] = ()
    epochs: int = EPOCHS
    cells: Literal["array", "all", "strategies"] = "array"

    @property
    def turn(self) -> int:
        """Number that chooses among cells, from the name alone, so that a new entry changes no other."""
        return zlib.crc32(self.name.encode())

    def all_callbacks(self, cell: Cell) -> list[Callback]:
        """Return the callbacks for the Trainer, with the accumulation of the cell."""
        callbacks = self.callbacks(cell)
        if cell.accumulation > 1 and not self.accumulates:
            callbacks.append(lo.GradientAccumulation(cell.accumulation))
        return callbacks

    def refusal(self, sharded: Sequence[int]) -> str | None:
        """Return words of the error that it raises in a model with matrices sharded along these dimensions, if any."""
        parts = [part for callback in self.callbacks(CELLS[0]) for part in parts_of(callback)]
        needs = {part.needs for part in parts if isinstance(part, lo.Policy) and not part.gathers}
        matrices, rows = bool(sharded) and "matrices" in needs, any(sharded) and "rows" in needs
        return "is computed on whole" if matrices or rows else None


def refused(entry: Entry, sharded: Sequence[int], call: Callable[[], Any]) -> bool:
    """Return whether a model that is sharded along these dimensions is refused; then assert that a call raises so."""
    if (words := entry.refusal(sharded)) is None:
        return False
    with pytest.raises(Exception, match=words):
        call()
    return True


def parts_of(thing: Any) -> list[Any]:
    """Return a callback and the policies in it, and in these."""
    if isinstance(thing, list | tuple):
        return [part for item in thing for part in parts_of(item)]
    if isinstance(thing, dict):
        return parts_of(list(thing.values()))
    if isinstance(thing, lo.OptimCallback | lo.Policy):
        return [thing, *parts_of(list(vars(thing).values()))]
    return []


class Shrinking(lo.OptimCallback):
    """Multiply the weights after each step, in the public hook, as a callback of a user may."""

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.mul_(0.98)


class SlowGradients(lo.Clipping):
    """Add the exponential mean of the gradients so far, a tensor beside each weight, as a policy of a user may."""

    limits = False

    def __init__(self, decay: float, strength: float) -> None:
        super().__init__()
        self.decay, self.strength = decay, strength
        self.add_state("slow", per_weight(torch.zeros_like))

    def _clip_(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        slow, shards = local_shards(self.slow.of(weights)), local_shards(grads)
        torch._foreach_lerp_(slow, shards, 1.0 - self.decay)
        torch._foreach_add_(shards, slow, alpha=self.strength)


class Gram(lo.Penalty):
    """Penalize the squared products of all pairs of rows, of matrices that it gathers, as a policy of a user may."""

    needs = "matrices"
    gathers = True

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def _value(self, weights: Sequence[Tensor]) -> Tensor:
        tall = [_tall(whole(weight)) for weight in weights]
        return self.strength * total_norm([matrix.mT @ matrix for matrix in tall]).square()

    def _add_grad_(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        for weight, grad in zip(weights, local_shards(grads), strict=True):
            tall = _tall(whole(weight))
            slope = tall @ (tall.mT @ tall)
            slope = slope if len(slope) == len(weight) else slope.mT
            grad.add_(shard_of(slope.reshape(weight.shape), weight), alpha=4.0 * self.strength)


class LocalGram(Gram):
    """The same without gathering: sharded matrices raise an error."""

    gathers = False


def _tall(weight: Tensor) -> Tensor:
    """Return a weight as a matrix, transposed if it has more columns than rows, so that the products are few."""
    matrix = weight.float().reshape(len(weight), -1)
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def fourth_powers(weight: Tensor) -> Tensor:
    """Return the sum of fourth powers, as a function of a user may."""
    return weight.pow(4).sum()


def _window(cell: Cell) -> int:
    """Return the window of an entry that tests accumulation: 2 in cells without, which would show no effect."""
    return 2 if cell.windows == "1" else cell.accumulation


def _several(cell: Cell) -> list[Callback]:
    return [
        lo.EarlyStopping("val_score", patience=2),
        lo.GradientClipping([lo.ClipByNorm(0.5), lo.ClipByValue(0.1)]),
        lo.WeightAveraging(lo.EMA(0.9)),
        lo.GradientAccumulation(_window(cell)),
        lo.WeightRegularization(lo.ElasticNet(0.2, 0.2)),
    ]


def _several_formula(cell: Cell) -> Formula:
    return Chain(
        gradients.Accumulate({0: _window(cell)}),
        regularization.Penalize("elasticnet", l1=0.2, l2=0.2),
        gradients.ClipNorm(0.5),
        gradients.ClipValue(0.1, logs=False),
        averaging.Average(0.9),
        stopping.Stop(patience=2),
    )


def _spike() -> list[Callback]:
    """Make gradient norms rise suddenly, so that policies that follow the norms have something to clip."""
    return [lo.WeightRegularization(lo.L2(lo.Piecewise({0.0: 0.0, 0.6: 8.0})))]


def _spike_formula() -> Formula:
    return gradients.Spike(8.0, start=0.6)


def _criteria() -> list[Entry]:
    """Return the entries of criteria, which read scores and no tensor of the model."""
    nan = math.nan
    table: tuple[tuple[str, Callable[[], lo.Criterion], Callable[[], stopping.Rule], tuple[float, ...]], ...] = (
        ("threshold", lambda: lo.Threshold("val_score", 2.5), lambda: stopping.Below(2.5), _SCORES),
        (
            "divergence",
            lambda: lo.Divergence("val_score", 4.5),
            lambda: stopping.Matching(lambda score: score > 4.5),
            (3.0, 4.0, 4.5, 5.0, 3.0, 3.0),
        ),
        (
            "nonfinite",
            lambda: lo.NonFinite("val_score"),
            lambda: stopping.Matching(lambda score: not math.isfinite(score)),
            (3.0, 4.0, nan, 5.0, 3.0, 3.0),
        ),
        (
            "any_of",
            lambda: lo.AnyOf([lo.NonFinite("val_score"), lo.Divergence("val_score", 9.0), lo.Plateau("val_score", 2)]),
            lambda: stopping.First(
                stopping.Matching(lambda score: not math.isfinite(score)),
                stopping.Matching(lambda score: score > 9.0),
                stopping.Patience(2),
            ),
            _SCORES,
        ),
        (
            "all_of",
            lambda: lo.AllOf([lo.Plateau("val_score", patience=1), lo.Divergence("val_score", 3.5)]),
            lambda: stopping.Enough(2, stopping.Patience(1), stopping.Matching(lambda score: score > 3.5)),
            _SCORES,
        ),
        (
            "at_least",
            lambda: lo.AtLeast(
                2, [lo.Plateau("val_score", patience=1), lo.Threshold("val_score", 3.5), lo.NonFinite("val_score")]
            ),
            lambda: stopping.Enough(
                2,
                stopping.Patience(1),
                stopping.Below(3.5),
                stopping.Matching(lambda score: not math.isfinite(score)),
            ),
            _SCORES,
        ),
    )
    return [
        Entry(
            name,
            "run",
            lambda _, made=made: [lo.EarlyStopping(made())],
            lambda _, rule=rule: stopping.StopBy(rule()),
            scores=scores,
            epochs=3,
            cells="strategies",
        )
        for name, made, rule, scores in table
    ]


# The best score before the stop is in the middle; the last one is better but comes after the stop.
_SCORES = (5.0, 4.0, 2.0, 3.0, 4.0, 1.0)

ENTRIES = (
    Entry("plain", "nothing", lambda _: [], _plain),
    Entry("after_step", "weights", lambda _: [Shrinking()], lambda _: regularization.Shrink(0.98)),
    Entry(
        "tensor_beside_each_weight",
        "gradients",
        lambda _: [lo.GradientClipping(SlowGradients(decay=0.8, strength=2.0))],
        lambda _: gradients.AddMean(decay=0.8, strength=2.0),
    ),
    Entry(
        "accumulation",
        "windows",
        lambda cell: [lo.GradientAccumulation(_window(cell))],
        lambda cell: gradients.Accumulate({0: _window(cell)}),
        without=lambda _: gradients.Accumulate({0: 1}),
        accumulates=True,
        cells="all",
    ),
    Entry(
        "accumulation_by_epoch",
        "windows",
        lambda cell: [lo.GradientAccumulation({0: cell.accumulation, 1: 2})],
        lambda cell: gradients.Accumulate({0: cell.accumulation, 1: 2}),
        accumulates=True,
    ),
    Entry(
        "target_batch_size",
        "windows",
        # A micro-batch has eight samples; two processes take four each.
        lambda cell: [lo.GradientAccumulation(lo.TargetBatchSize(16, micro_batch_size=8 // cell.processes))],
        lambda cell: gradients.Accumulate({0: 2}),
        without=lambda _: gradients.Accumulate({0: 1}),
        accumulates=True,
    ),
    Entry(
        "l1_l2",
        "gradients",
        lambda _: [lo.WeightRegularization([lo.L1(0.2), lo.L2(0.2)])],
        lambda _: Chain(regularization.Penalize("l1", l1=0.2), regularization.Penalize("l2", l2=0.2)),
        cells="all",
    ),
    Entry(
        "elastic_net_on_all",
        "gradients",
        lambda _: [lo.WeightRegularization([lo.ElasticNet(0.2, 0.2, on="*")])],
        lambda _: regularization.Penalize("elasticnet", l1=0.2, l2=0.2, everything=True),
    ),
    Entry(
        "l2sp",
        "gradients",
        lambda _: [lo.WeightRegularization(lo.L2SP(20.0))],
        lambda _: regularization.PullToStart("l2sp", 20.0),
    ),
    Entry(
        "orthogonal",
        "gradients",
        lambda _: [lo.WeightRegularization(lo.Orthogonal(0.4))],
        lambda _: regularization.RowProducts("orthogonal", 0.4, identity=True),
    ),
    Entry(
        "penalty_function",
        "gradients",
        lambda _: [lo.WeightRegularization(lo.Penalty.from_function(fourth_powers, 0.6, on="*"))],
        lambda _: regularization.FourthPowers("fourth_powers", 0.6),
    ),
    Entry(
        "group_lasso",
        "gradients",
        lambda _: [lo.WeightRegularization(lo.GroupLasso(0.6))],
        lambda _: regularization.GroupNorms("grouplasso", 0.6),
    ),
    Entry(
        "group_lasso_of_columns",
        "gradients",
        lambda _: [lo.WeightRegularization(lo.GroupLasso(0.3, dim=1, scale_by_size=True, on="*"))],
        lambda _: regularization.GroupNorms("grouplasso", 0.3, columns=True, by_size=True, everything=True),
    ),
    *(
        Entry(
            name,
            "gradients",
            lambda _, kind=kind: [lo.WeightRegularization(kind(0.2))],
            lambda _, kind=kind: regularization.RowProducts(kind.__name__.lower(), 0.2),
        )
        for name, kind in (("gathered_matrices", Gram), ("whole_matrices", LocalGram))
    ),
    Entry(
        "dropout",
        "gradients",
        lambda _: [fixed(lo.ScheduledDropout({"*inner": lo.Linear(0.5, 0.0)}, insert=True))],
        lambda _: Dropout(0.5, "regularization/dropout/*inner"),
    ),
    Entry(
        "weight_dropout",
        "gradients",
        lambda _: [fixed(lo.ScheduledDropout({"*inner": lo.Linear(0.5, 0.0)}, insert="weight"))],
        lambda _: WeightDropout(0.5, "regularization/dropout/*inner"),
    ),
    Entry(
        "activations",
        "gradients",
        lambda _: [lo.ActivationRegularization([lo.L1(0.1), lo.L2(0.1)], on="*inner")],
        lambda _: losses.PenalizeOutputs(0.1, 0.1),
    ),
    Entry(
        "flooding",
        "gradients",
        # Every loss is above the first level and below the second one, so that the parts of two ranks agree on it.
        lambda _: [lo.Flooding(lo.Piecewise({0.0: 0.4, 0.5: 4.5}))],
        lambda _: losses.Flood(0.4, 4.5),
    ),
    Entry(
        "proximal_l1",
        "weights",
        lambda _: [lo.WeightRegularization(lo.ProximalL1(2.0))],
        lambda _: regularization.SoftThreshold(2.0),
    ),
    *(
        Entry(
            f"proximal_group_lasso_{dim}",
            "weights",
            lambda _, dim=dim, by_size=by_size: [lo.WeightRegularization(lo.ProximalGroupLasso(2.0, dim, by_size))],
            lambda _, dim=dim, by_size=by_size: regularization.Groups(
                lambda norm, size, lr: max(1.0 - lr * 2.0 * (size**0.5 if by_size else 1.0) / norm, 0.0), dim
            ),
        )
        for dim, by_size in ((0, True), (1, False))
    ),
    *(
        Entry(
            f"max_norm_{dim}",
            "weights",
            lambda _, dim=dim: [lo.WeightRegularization(lo.MaxNorm(0.4, dim))],
            lambda _, dim=dim: regularization.Groups(lambda norm, size, lr: min(1.0, 0.4 / norm), dim),
        )
        for dim in (0, 1)
    ),
    *(
        Entry(
            f"unit_norm_{dim}",
            "weights",
            lambda _, dim=dim: [lo.WeightRegularization(lo.UnitNorm(dim))],
            lambda _, dim=dim: regularization.Groups(lambda norm, size, lr: 1.0 / norm, dim),
        )
        for dim in (0, 1)
    ),
    Entry(
        "non_negative",
        "weights",
        lambda _: [lo.WeightRegularization(lo.NonNegative())],
        lambda _: regularization.Clamp(),
    ),
    Entry(
        "weight_decay",
        "weights",
        lambda _: [lo.WeightRegularization(lo.WeightDecay(2.0))],
        lambda _: regularization.Decay(2.0),
    ),
    Entry(
        "cautious_weight_decay",
        "weights",
        lambda _: [lo.WeightRegularization(lo.WeightDecay(0.02, cautious=True, follows_lr=False))],
        lambda _: regularization.Decay(0.02, cautious=True, following=False),
    ),
    Entry(
        "scheduled_terms",
        "gradients",
        lambda _: [
            lo.WeightRegularization(
                [
                    lo.L1(lo.Linear(0.4, 0.0)),
                    lo.L2(lo.Cosine(0.0, 0.3)),
                    lo.ElasticNet(lo.Constant(0.1), 0.0),
                    lo.ProximalL1(lo.Exponential(2.0, 0.2)),
                ]
            )
        ],
        lambda _: Chain(
            Scheduled(lambda l1: regularization.Penalize("l1", l1=l1), linear(0.4, 0.0)),
            Scheduled(lambda l2: regularization.Penalize("l2", l2=l2), cosine(0.0, 0.3)),
            regularization.Penalize("elasticnet", l1=0.1),
            Scheduled(regularization.SoftThreshold, exponential(2.0, 0.2)),
        ),
    ),
    Entry(
        "scheduled_clipping",
        "gradients",
        lambda _: [
            lo.GradientClipping([lo.ClipByNorm(lo.Exponential(0.5, 0.2)), lo.ClipByValue(lo.Linear(0.1, 0.05))])
        ],
        lambda _: Chain(
            Scheduled(gradients.ClipNorm, exponential(0.5, 0.2)),
            Scheduled(lambda value: gradients.ClipValue(value, logs=False), linear(0.1, 0.05)),
        ),
    ),
    Entry("exact_resume", "nothing", lambda _: [lo.ExactResume()], _plain),
    Entry(
        "clip_norm",
        "gradients",
        lambda _: [lo.GradientClipping(lo.ClipByNorm(0.5))],
        lambda _: gradients.ClipNorm(0.5),
        cells="all",
    ),
    Entry(
        "clip_norm_inf",
        "gradients",
        lambda _: [lo.GradientClipping(lo.ClipByNorm(0.3, norm_type=math.inf))],
        lambda _: gradients.ClipNorm(0.3, norm_type=math.inf),
    ),
    Entry(
        "clip_value",
        "gradients",
        lambda _: [lo.GradientClipping(lo.ClipByValue(0.1))],
        lambda _: gradients.ClipValue(0.1),
    ),
    Entry(
        "clip_by_pattern",
        "gradients",
        # The first match wins, and nothing matches the scale.
        lambda _: [
            lo.GradientClipping({"*inner.bias": 0.05, "*inner*": [lo.ClipByNorm(0.3)], "*outer*": lo.ClipByValue(0.1)})
        ],
        lambda _: gradients.ByName(
            {
                "inner.bias": gradients.ClipNorm(0.05),
                "inner": gradients.ClipNorm(0.3),
                "outer": gradients.ClipValue(0.1),
            }
        ),
    ),
    Entry(
        "clip_by_optimizer",
        "gradients",
        lambda cell: [lo.GradientClipping({0: 0.5} | ({1: lo.ClipByValue(0.1)} if cell.optimizers > 1 else {}))],
        lambda _: gradients.ByOptimizer(gradients.ClipNorm(0.5), gradients.ClipValue(0.1)),
    ),
    Entry(
        "monitor",
        "gradients",
        lambda _: [lo.GradientMonitor(), lo.GradientClipping(0.5)],
        lambda _: gradients.Measure(gradients.ClipNorm(0.5)),
        cells="all",
    ),
    Entry(
        "rows",
        "gradients",
        lambda _: [lo.GradientClipping([lo.Centralize(), lo.AGC(0.6)])],
        lambda _: Chain(gradients.RowMean(), gradients.RowClip(0.6)),
        # Against the second policy alone, so that the effect is that of the first.
        without=lambda _: gradients.RowClip(0.6),
    ),
    Entry(
        "noise",
        "gradients",
        lambda _: [lo.GradientClipping(lo.Noise(eta=10.0))],
        lambda _: gradients.Draw(eta=10.0, gamma=0.55),
    ),
    Entry(
        "auto_clip",
        "gradients",
        lambda _: [*_spike(), lo.GradientClipping(lo.AutoClip(percentile=50.0, scope="tensor"))],
        lambda _: Chain(_spike_formula(), gradients.PercentileClip(50.0)),
        without=lambda _: _spike_formula(),
    ),
    Entry(
        "zclip",
        "gradients",
        lambda _: [*_spike(), lo.GradientClipping(lo.ZClip(z=2.0, decay=0.9, warmup=2))],
        lambda _: Chain(_spike_formula(), gradients.ScoreClip(z=2.0, decay=0.9, warmup=2)),
        without=lambda _: _spike_formula(),
    ),
    Entry(
        "ema",
        "evaluation",
        lambda _: [lo.WeightAveraging(lo.EMA(0.9))],
        lambda _: averaging.Average(0.9),
        cells="all",
    ),
    Entry(
        "ema_every_2",
        "evaluation",
        # A decay that the warm-up reaches within the few steps of a cell.
        lambda _: [lo.WeightAveraging(lo.EMA(0.5), every=2)],
        lambda _: averaging.Average(0.5, every=2),
    ),
    Entry(
        "ema_drop_in",
        "evaluation",
        lambda _: [lo.EMAWeightAveraging(decay=0.8, update_every_n_steps=2)],
        lambda _: averaging.Constant(0.8, every=2),
    ),
    Entry("swa", "evaluation", lambda _: [lo.WeightAveraging(lo.SWA())], lambda _: averaging.Mean()),
    Entry(
        "swa_drop_in",
        "evaluation",
        lambda _: [lo.StochasticWeightAveraging(swa_epoch_start=1)],
        lambda _: averaging.Mean(by_epoch=True),
    ),
    Entry("lawa", "evaluation", lambda _: [lo.WeightAveraging(lo.LAWA(3))], lambda _: averaging.Mean(size=3)),
    Entry(
        "stop",
        "run",
        lambda _: [lo.EarlyStopping("val_score", patience=2)],
        lambda _: stopping.Stop(patience=2),
        scores=_SCORES,
        epochs=3,
        cells="all",
    ),
    *_criteria(),
    Entry("several", "run", _several, _several_formula, accumulates=True, scores=_SCORES, epochs=3),
)


class Kept(ModelCheckpoint):
    """Save in a temporary folder, which is removed after the fit. The files of the first version have this name."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = trainer.strategy.broadcast(tempfile.mkdtemp(prefix="kept-"))
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.barrier()
        shutil.rmtree(str(self.dirpath), ignore_errors=True)


# Techniques that act after the fit. They have no state that an interruption could change.
ENTRIES_AT_END = tuple(
    Entry(
        f"checkpoint_averaging_{outcome}",
        "end",
        lambda _: [lo.CheckpointAveraging(top=2), Kept(monitor="val_score", save_top_k=2)],
        lambda _: averaging.BestMean(top=2),
        scores=(5.0, 2.0, 4.0, 3.0, score),  # the last is that of the mean; within a window nothing is saved
    )
    for outcome, score in (("wins", 1.0), ("loses", 2.5))
)

ALL_ENTRIES = (*ENTRIES, *ENTRIES_AT_END)


def chosen_cells(entry: Entry) -> tuple[Cell, ...]:
    """Return the cells of an entry in the normal test run; the array is chosen by its name."""
    if entry.cells == "all":
        return CELLS
    turn = entry.turn
    array = orthogonal_array(turn)
    first = 3 * (turn % 3)  # Each third of the array has each strategy once.
    return array if entry.cells == "array" else array[first : first + 3]


BY_NAME = {entry.name: entry for entry in ALL_ENTRIES}


def fit(name: str, cell: Cell, **changes: Any) -> Outcome:
    """Train a cell with the callbacks of an entry, in this process or as a job of a group."""
    entry = BY_NAME[name]
    return run.fit(cell, entry.all_callbacks(cell), entry.scores, **({"max_epochs": entry.epochs} | changes))
