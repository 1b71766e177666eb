"""One run of a case, up to its file, from its file, or whole; what is read of it; and how two are compared."""

from __future__ import annotations

import io
import lzma
import math
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optim import (
    CheckpointAveraging,
    Criterion,
    EarlyStopping,
    ExactResume,
    GradientAccumulation,
    GradientClipping,
    GradientMonitor,
    OptimCallback,
    WeightAveraging,
)
from tests.data.first_version.cases import Case
from tests.data.first_version.models import VALIDATE_EVERY, weights_of
from tests.lightning import Callback, Checkpoint, LightningModule, Logger, MixedPrecision, Trainer, isolate_rng

HERE = Path(__file__).parent
CHECKPOINT, END = ".ckpt.xz", ".end.xz"

_READ: dict[type, tuple[str, ...]] = {
    OptimCallback: ("steps",),
    EarlyStopping: (
        "best_score",
        "wait_count",
        "best_check",
        "history",
        "stopped_epoch",
        "stopping_reason_message",
        "best_path",
    ),
    Criterion: ("best", "wait"),
    GradientAccumulation: ("is_open",),
    GradientClipping: ("skipped", "skipped_at"),
    GradientMonitor: ("skipped",),
    CheckpointAveraging: ("score",),
}
"""The public attributes in which a callback shows what it remembers."""


class Recorder(Logger):
    """Keep the logged values of each name by step."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, {})[step or 0] = float(value)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class Enough(Exception):
    """Ends a run of which only the beginning is wanted."""


class Moment(Checkpoint):
    """Does something after a micro-batch of the run, when all other callbacks have done their work."""

    def __init__(self, after: int, action: Callable[[Trainer, Any], None]) -> None:
        self.after, self.action = after, action

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if pl_module.seen == self.after:
            self.action(trainer, pl_module)


class Run:
    """A case that is trained: the Trainer, the module, and the callbacks in the order of the case."""

    def __init__(self, case: Case, epochs: int, moment: Moment | None = None) -> None:
        self.case = case
        self.callbacks = case.callbacks()
        self.module = case.model(scores=case.scores, **case.traits)
        self.recorder = Recorder()
        listed = [*self.callbacks, *([] if moment is None else [moment])]
        arguments = dict(
            accelerator="cpu",
            devices=1,
            callbacks=listed,
            max_epochs=epochs,
            val_check_interval=VALIDATE_EVERY,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=self.recorder,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in listed),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if case.scales:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=13)
            arguments["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
        self.trainer = Trainer(**(arguments | dict(case.trainer)))
        self.raised = ""

    def fit(self, path: Path | None = None) -> None:
        # A run that goes on starts from another state of the generators: only its file can bring it onto its way.
        seed = 1 if path is None else 2
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            self.trainer.fit(self.module, ckpt_path=path, weights_only=True)
        except RuntimeError as error:
            if not self.case.raises:
                raise
            self.raised = type(error).__name__

    def now(self) -> dict[str, Any]:
        """Return the state of the run at this moment: weights, momentum, and the state of callbacks."""
        momentum = [state["momentum_buffer"] for opt in self.trainer.optimizers for state in opt.state.values()]
        return {
            "weights": weights_of(self.module),
            "momentum": [buffer.clone() for buffer in momentum],
            "read": self.read(),
            "position": self.trainer.fit_loop.epoch_loop._batches_that_stepped,
        }

    def end(self, position: int) -> dict[str, Any]:
        """Return the results of the run, with the values that it logged after a position."""
        logged = {
            name: {step: value for step, value in values.items() if step > position}
            for name, values in self.recorder.logged.items()
        }
        return {
            "final": weights_of(self.module),
            "raw": self.module.raw,
            "validations": self.module.validations,
            "logged": {name: values for name, values in logged.items() if values},
            "rates": [group["lr"] for opt in self.trainer.optimizers for group in opt.param_groups],
            "draws": [torch.rand(1).item(), random.random(), np.random.rand()] if self.case.draws else [],
            "read": self.read(),
            **({"raised": self.raised} if self.case.raises else {}),
        }

    def read(self) -> list[dict[str, Any]]:
        """Return the state of each callback as its public attributes and methods show it."""
        return [read(callback, self.module) for callback in self.callbacks]

    def states(self) -> dict[str, Any]:
        """The callbacks' state in its own layout, but for that of the generators."""
        ours = [c for c in self.callbacks if isinstance(c, OptimCallback) and not isinstance(c, ExactResume)]
        return {callback.state_key: copied(callback.state_dict()) for callback in ours}


def read(callback: Callback | Criterion, module: LightningModule) -> dict[str, Any]:
    """Return the state of a callback as its public attributes and methods show it."""
    kinds = [names for kind, names in _READ.items() if isinstance(callback, kind)]
    found: dict[str, Any] = {"kind": type(callback).__name__}
    found |= {name: getattr(callback, name) for names in kinds for name in names if hasattr(callback, name)}
    if isinstance(callback, EarlyStopping):
        found["criterion"] = read(callback.criterion, module)
    if isinstance(callback, Criterion):
        found["criteria"] = [read(one, module) for one in getattr(callback, "criteria", [])]
    if isinstance(callback, GradientMonitor):
        shares, count = (0.0, 30.0, 50.0, 70.0, 100.0), len(callback.steps)
        found["norms"] = [callback.suggest_clip(share, index) for index in range(count) for share in shares]
    if isinstance(callback, WeightAveraging):
        with callback.averaged_weights(module):
            found["averaged"] = weights_of(module)
        found["points"] = callback.comparison.points
    return copied(found)


def unpack(name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Put the checkpoint of a case, and the folder that belongs to it, into a folder; what the run was and ended as."""
    path = folder / f"{name}.ckpt"
    if (HERE / name).is_dir():
        shutil.copytree(HERE / name, folder / name)
    path.write_bytes(lzma.decompress((HERE / f"{name}{CHECKPOINT}").read_bytes()))
    return path, unpack_end(name)


def unpack_end(name: str) -> dict[str, Any]:
    """Return the state of a run when its checkpoint was written, and its results."""
    return torch.load(io.BytesIO(lzma.decompress((HERE / f"{name}{END}").read_bytes())), weights_only=True)


def whole(case: Case) -> Run:
    """The run without an interruption."""
    run = Run(case, case.epochs + case.more)
    run.fit()
    return run


def begun(case: Case, path: Path | None = None) -> dict[str, Any]:
    """The run up to the moment of the file, which is written if a path is given; what it was then."""
    found: dict[str, Any] = {}

    def look(trainer: Trainer, module: Any) -> None:
        found.update(run.now())
        if path is not None:
            trainer.save_checkpoint(path)
        if case.after:
            raise Enough

    run = Run(case, case.epochs, Moment(case.after, look))
    with isolate_rng():
        try:
            run.fit()
        except Enough:
            pass
        else:
            assert not case.after, "the run was over before its file was written"
            look(run.trainer, run.module)
    return found


def resumed(case: Case, path: Path, position: int) -> tuple[Run, dict[str, Any]]:
    """The rest of the run, from its file."""
    with isolate_rng():
        run = Run(case, case.epochs + case.more)
        run.fit(path)
        return run, run.end(position)


def without(case: Case, key: str, path: Path, beside: Path, position: int) -> dict[str, Any]:
    """The rest of the run, from a copy of its file that has lost what one callback remembers."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"][key]
    for name in ("averaging_state", "current_model_state"):  # the same once more, for Lightning's own callback
        checkpoint.pop(name, None)
    torch.save(checkpoint, beside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resumed(case, beside, position)[1]


def differences(one: Any, other: Any, tolerance: float = 0.0, path: str = "") -> list[str]:
    """Return the paths at which two nested structures differ: in a bit, or by more than a relative tolerance."""
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{path}/{key} is in one only" for key in one.keys() ^ other.keys()]
        both = [key for key in one if key in other]
        return missing + [d for key in both for d in differences(one[key], other[key], tolerance, f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, tolerance, f"{path}/{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and _alike(one, other, tolerance)
    elif isinstance(one, float) and isinstance(other, float):
        same = one == other or math.isclose(one, other, rel_tol=tolerance) or (one != one and other != other)
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [f"{path}: {one!r} and {other!r}"]


def _alike(one: Tensor, other: Tensor, tolerance: float) -> bool:
    nans = one.isnan()
    if not torch.equal(nans, other.isnan()):
        return False
    ours, theirs = one.masked_fill(nans, 0), other.masked_fill(nans, 0)
    if tolerance == 0.0 or torch.equal(ours, theirs):
        return torch.equal(ours, theirs)
    return bool(((ours - theirs).abs() <= tolerance * theirs.abs().max()).all())


def but_for_steps(end: dict[str, Any]) -> dict[str, Any]:
    """An end without the counts of steps, in which all callbacks show that they have lost their state."""
    return end | {"read": [{k: v for k, v in seen.items() if k != "steps"} for seen in end["read"]]}


def copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copied(value) for value in tree]
    return tree.detach().clone() if isinstance(tree, Tensor) else tree
