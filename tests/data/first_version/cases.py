"""List the runs of the first version: entries of the registry, and cases that they leave out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_optim import (
    AGC,
    EMA,
    L1,
    L2,
    LAWA,
    SWA,
    AllOf,
    AnyOf,
    AtLeast,
    AutoClip,
    Centralize,
    ClipByNorm,
    ClipByValue,
    Divergence,
    EarlyStopping,
    ElasticNet,
    EMAWeightAveraging,
    ExactResume,
    GradientAccumulation,
    GradientClipping,
    GradientMonitor,
    Linear,
    Noise,
    NonFinite,
    Piecewise,
    Plateau,
    ScheduledDropout,
    StochasticWeightAveraging,
    TargetBatchSize,
    Threshold,
    WeightAveraging,
    WeightRegularization,
    ZClip,
)
from tests import registry
from tests.data.first_version import models
from tests.data.first_version.models import Model
from tests.lightning import Callback

CELL = registry.Cell("automatic", "32-true", "single", "1")
"""Cell for the entries of the registry, which read the size of its windows alone."""

AFTER = 13
"""The micro-batch after which files were written: the first of the third epoch, so that windows of two are open."""

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """A run of which there is a file.

    Attributes:
        name: The file's name, without ``.ckpt``.
        callbacks: Makes fresh callbacks.
        scores: What validation logs beside ``val_loss``: name to values, one for each of the two validations of an
            epoch.
        epochs: The length of the run.
        after: The micro-batch after which the file was written; 0 if it was after the end of the fit.
        more: The epochs that are added when a fit that had ended goes on.
        model: The module.
        traits: Arguments for the module.
        trainer: Arguments for the Trainer.
        draws: Whether the run must also leave the generators as the whole run did.
        folder: A folder of files that belongs to the checkpoint.
        scales: Whether it is trained in 16 bit, with a loss scale that grows between the next steps of two optimizers.
        raises: Whether the run must end with an error.
        tolerance: How far a value may be from the one in the file where the processor rounds otherwise.
    """

    name: str
    callbacks: Callable[[], list[Callback]]
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    epochs: int = 4
    after: int = AFTER
    more: int = 0
    model: type[Model] = Model
    traits: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    draws: bool = False
    folder: str | None = None
    scales: bool = False
    raises: bool = False
    tolerance: float = 1e-6


def _of_registry(name: str, **changes: Any) -> Case:
    entry = registry.BY_NAME[name]
    scores = {"val_score": entry.scores} if entry.scores else {}
    made = {"scores": scores, "epochs": 3 if entry.scores else 4} | changes
    return Case(f"entry_{name}", lambda: entry.all_callbacks(CELL), **made)


_ENTRIES = (
    "plain",
    "after_step",
    "accumulation",
    "accumulation_by_epoch",
    "l1_l2",
    "elastic_net_on_all",
    "dropout",
    "proximal_l1",
    "clip_norm",
    "clip_norm_inf",
    "clip_value",
    "monitor",
    "rows",
    "noise",
    "auto_clip",
    "zclip",
    "ema",
    "ema_every_2",
    "ema_drop_in",
    "swa",
    "swa_drop_in",
    "lawa",
    "stop",
    "several",
)

_RANDOM = {"model": models.RandomModel, "draws": True}
_TWO = {"model": models.TwoModel}
_SPIKES = {"faults": {4: NAN, 12: NAN, 15: 1e4, 19: NAN}}
_UNEVEN = {"sizes": (6, 2, 4)}

_EARLY = {"val_score": (5.0, 4.0, 2.0, 3.5, 3.2, 2.5, 2.6, 2.7)}
_BEYOND = {"val_score": (5.0, 4.0, 3.0, 3.15, 3.1, 3.12, 3.19, 3.5)}
_LATE = {"val_score": (5.0, 4.0, 3.0, 3.5, 2.0, 2.5, 2.6, 1.0)}
_TWO_SCORES = _EARLY | {"val_other": (0.1, 0.5, 0.4, 0.45, 0.3, 0.2, 0.6, 0.1)}


def _average_of_powers(averaged: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    return averaged + (weight - averaged) / (count + 2)


class EveryThird(WeightAveraging):
    """Decides by itself when to average."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None or (step_idx is not None and step_idx % 3 == 1)


class ForwardOnly(WeightAveraging):
    """Estimates statistics under manual optimization, where `training_step` would step."""

    def forward_batch(self, pl_module: Any, batch: Any) -> None:
        pl_module.losses(batch)


def _spikes(*policies: Any) -> list[Callback]:
    spike = WeightRegularization(L2(Piecewise({0.0: 0.0, 0.6: 8.0})))
    return [spike, GradientMonitor(), GradientClipping(list(policies))]


def _criteria() -> EarlyStopping:
    some = AllOf([Threshold("val_other", 0.35, mode="max"), Plateau("val_loss", patience=1)])
    either = AnyOf([NonFinite("val_loss"), Divergence("val_score", 9.0), Plateau("val_score", patience=2)])
    return EarlyStopping(
        AtLeast(2, [Plateau("val_other", patience=4, mode="max"), some, either]), best_by=["val_score"]
    )


def _averages() -> list[Callback]:
    return [
        WeightAveraging(EMA(half_life=3.0), start=2),
        WeightAveraging(LAWA(4), every="epoch", evaluate=False, apply_at_end=False, name="late"),
        WeightAveraging(SWA(), start=0.25, every=2, evaluate=False, apply_at_end=False),
        WeightAveraging(EMA(0.7), device="cpu", dtype="float64", evaluate=False, apply_at_end=False, name="wide"),
    ]


def _norm(average: Any, **arguments: Any) -> list[Callback]:
    return [WeightAveraging(average, **arguments)]


CASES = (
    *(_of_registry(name) for name in _ENTRIES),
    _of_registry("exact_resume", **_RANDOM),
    # The file comes after the fit: what it ends with is in the module, and what trained in the callback's state.
    *(
        _of_registry(
            f"checkpoint_averaging_{outcome}",
            scores={"val_score": (5.0, 2.0, 4.0, 3.0, score, 4.0, 3.5, 1.5, 2.0, 0.5)},
            epochs=2,
            after=0,
            more=2,
        )
        for outcome, score in (("wins", 1.0), ("loses", 2.5))
    ),
    Case("ended_ema", lambda: [WeightAveraging(EMA(0.9))], epochs=2, after=0, more=2),
    Case(
        "ended_stop",
        lambda: [EarlyStopping("val_score", patience=9), WeightAveraging(SWA())],
        scores=_LATE,
        epochs=2,
        after=0,
        more=2,
    ),
    # Gradients.
    Case("auto_clip_group", lambda: _spikes(AutoClip(50.0, history=8, scope="group")), traits={"groups": True}),
    Case("zclip_tensor", lambda: _spikes(ZClip(z=2.0, decay=0.9, warmup=2, scope="tensor"))),
    Case(
        "zclip_release",
        lambda: _spikes(ZClip(z=0.1, decay=0.0, warmup=9, release_after=3), ClipByNorm(9.0, scope="group")),
    ),
    Case(
        "policies_two",
        lambda: [
            *_spikes(Noise(0.3, seed=3), Centralize(), AutoClip(60.0), ZClip(warmup=3), AGC(0.9), ClipByValue(0.5)),
            GradientAccumulation(2),
        ],
        **_TWO,
    ),
    Case(
        "skipped",
        lambda: [GradientMonitor(history=9), GradientClipping([ClipByNorm(0.5)], spike=3.0)],
        traits=_SPIKES,
    ),
    Case(
        "skipped_two",
        lambda: [GradientMonitor("parameter"), GradientClipping(0.5, spike=3.0, name="own")],
        traits=_SPIKES,
        **_TWO,
    ),
    Case(
        "skipped_in_a_row",
        lambda: [GradientClipping(0.5, max_consecutive_skips=1)],
        traits={"faults": {12: NAN, 13: NAN}},
        raises=True,
    ),
    Case("monitor_module", lambda: [GradientMonitor("module", history=15)]),
    # Accumulation.
    Case("weighted", lambda: [GradientAccumulation(2, weight_by="sample")], traits=_UNEVEN),
    Case(
        "weighted_by_function",
        lambda: [GradientAccumulation({0: 3, 2: 4}, weight_by=lambda batch: (batch[0][:, 0] > 0).sum(), name="own")],
        traits=_UNEVEN,
    ),
    Case("weighted_two", lambda: [GradientAccumulation(2, weight_by="sample")], traits=_UNEVEN, **_TWO),
    Case(
        "scaled_two",
        lambda: [GradientAccumulation(2), GradientClipping(ClipByNorm(0.5)), WeightAveraging(EMA(0.9))],
        scales=True,
        tolerance=1e-2,
        **_TWO,
    ),
    Case(
        "accumulation_manual",
        lambda: [GradientAccumulation(4), GradientClipping(0.5), WeightAveraging(EMA(0.6))],
        model=models.ManualModel,
    ),
    Case("target", lambda: [GradientAccumulation(TargetBatchSize(11, micro_batch_size=6))]),
    # Averages.
    Case("averages", _averages),
    Case("ema_two", lambda: [WeightAveraging(EMA(0.9)), GradientAccumulation(2)], **_TWO),
    Case("lawa_two", lambda: [WeightAveraging(LAWA(3), every=2)], **_TWO),
    Case("swa_two", lambda: [WeightAveraging(SWA(), every="epoch")], **_TWO),
    Case("ema_bf16", lambda: [WeightAveraging(EMA(0.5, warmup=None), dtype="bfloat16")], tolerance=1e-2),
    Case("lawa_bf16", lambda: [WeightAveraging(LAWA(3), dtype=torch.bfloat16)], tolerance=1e-2),
    Case("swa_float64", lambda: [WeightAveraging(SWA(), dtype="float64")]),
    Case("ema_asks", lambda: [EveryThird(EMA(0.8))]),
    Case("ema_compares", lambda: [WeightAveraging(EMA(0.9), compare=True)]),
    Case("ema_drop_in_late", lambda: [EMAWeightAveraging(decay=0.8, update_starting_at_epoch=1, use_buffers=False)]),
    Case(
        "swa_drop_in_rates",
        lambda: [StochasticWeightAveraging(swa_lrs=[0.02, 0.03], swa_epoch_start=2, annealing_epochs=3)],
        traits={"groups": True},
    ),
    Case(
        "swa_drop_in_function",
        lambda: [StochasticWeightAveraging(swa_epoch_start=0.5, avg_fn=_average_of_powers, device=None)],
    ),
    Case("norm_ema", lambda: _norm(EMA(0.8)), traits={"norm": True}),
    Case("norm_swa", lambda: _norm(SWA(), compare=True, refresh_batches=4), traits={"norm": True}),
    Case("norm_lawa", lambda: _norm(LAWA(3), buffers={"*mean": "copy", "*": "average"}), traits={"norm": True}),
    Case("norm_swa_two", lambda: [ForwardOnly(SWA(), buffers="refresh")], traits={"norm": True}, **_TWO),
    # Stopping.
    Case("criteria", lambda: [_criteria()], scores=_TWO_SCORES),
    Case(
        "criteria_bounds",
        lambda: [
            EarlyStopping(
                "val_score", 0.2, 5, stopping_threshold=1.5, divergence_threshold=9.0, best_by={"val_other": 2.0}
            )
        ],
        scores=_TWO_SCORES,
    ),
    Case("threshold", lambda: [EarlyStopping(Threshold("val_score", 3.2))], scores=_BEYOND, trainer={"min_epochs": 4}),
    Case(
        "threshold_over",
        lambda: [EarlyStopping(Threshold("val_score", 3.2))],
        scores={"val_score": (5.0, 4.0, 3.0, 3.15, 3.5, 3.6, 3.7, 3.8)},
        trainer={"min_epochs": 4},
    ),
    Case(
        "frozen",
        lambda: [EarlyStopping("val_score", patience=9), WeightAveraging(EMA(0.8))],
        scores=_EARLY,
        model=models.FrozenModel,
    ),
    Case(
        "stop_asked",
        lambda: [EarlyStopping("val_score", patience=1, restore_best=False)],
        scores={"val_score": (5.0, 4.0, 3.0, 3.5, 3.6, 3.55, 3.54, 3.53)},
        trainer={"min_epochs": 3},
    ),
    Case(
        "stop_at_epochs",
        lambda: [EarlyStopping("val_score", patience=1, check_on_train_epoch_end=True, name="own")],
        scores={"val_score": (5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 3.8, 3.9)},
    ),
    Case(
        "stop_in_folder",
        lambda: [EarlyStopping("val_score", patience=2, dirpath="stop_in_folder"), WeightAveraging(EMA(0.8))],
        scores={"val_score": registry.BY_NAME["stop"].scores},
        epochs=3,
        folder="stop_in_folder",
    ),
    Case(
        "stop_with_average_two",
        lambda: [EarlyStopping("val_score", patience=2), WeightAveraging(EMA(0.8))],
        scores={"val_score": registry.BY_NAME["stop"].scores},
        epochs=3,
        **_TWO,
    ),
    # Randomness, regularization and the mixins.
    Case(
        "exact_dropout",
        lambda: [ExactResume(), ScheduledDropout({"*inner": Linear(0.6, 0.2)}, insert=True), GradientAccumulation(2)],
        **_RANDOM,
    ),
    Case(
        "everything",
        lambda: [
            ExactResume(),
            EarlyStopping("val_score", patience=9),
            GradientMonitor(),
            GradientClipping([AutoClip(70.0), Noise(0.1)]),
            GradientAccumulation(2, weight_by="sample"),
            WeightRegularization([L1(0.1), ElasticNet(0.1, Linear(0.0, 0.3))]),
            WeightAveraging(EMA(0.8)),
        ],
        scores=_EARLY,
        **_RANDOM,
    ),
    Case(
        "sharp",
        lambda: [WeightAveraging(EMA(0.8)), GradientClipping(ZClip(z=0.5, decay=0.5, warmup=3))],
        model=models.SharpModel,
    ),
    Case("regularized", lambda: [WeightRegularization(L2(Linear(0.0, 2.0)))], model=models.RegularizedModel),
)
