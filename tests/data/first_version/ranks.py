"""Runs of two processes: files that hold what the ranks differ in, and a folder with the shards of averages.

* ``<kind>.tar.xz``: the checkpoint, a file or, of ``folder``, a distributed checkpoint.
* ``<kind>.end.xz``: for each rank what the run was at that moment, and what it ended with.

The functions here are jobs, called on both ranks.
"""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_optim import (
    EMA,
    LAWA,
    AutoClip,
    EarlyStopping,
    ExactResume,
    GradientAccumulation,
    GradientClipping,
    GradientMonitor,
    Noise,
    WeightAveraging,
)
from tests import registry
from tests.data.first_version import runs
from tests.data.first_version.cases import AFTER
from tests.data.first_version.models import (
    BATCHES,
    VALIDATE_EVERY,
    Loader,
    Model,
    RandomModel,
    make_batches,
    weights_of,
)
from tests.lightning import DDPStrategy, ModelParallelStrategy, Trainer, isolate_rng

KINDS = ("ddp", "fsdp2", "folder")
EPOCHS = 3
SCORES = {"val_score": (5.0, 4.0, 2.0, 3.5, 3.2, 2.5)}


class OfRanks(Model):
    """Each rank has batches of its own, of sizes of its own."""

    def factor(self) -> float:
        return super().factor() or 1.0  # Lightning refuses a batch without a loss here

    def train_dataloader(self) -> Loader:
        sizes = (6, 2, 4) if self.global_rank else (4, 6)
        batches = make_batches(BATCHES, 10 + self.global_rank, sizes)
        return Loader(batches, shuffles=isinstance(self, RandomModel))


class Sharded(Model):
    """One layer is a group of its own."""

    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net.inner)
            fully_shard(self.net)


class Replicated(OfRanks, RandomModel):
    """Draws on each rank, and has BatchNorm, whose statistics are of a rank's own batches."""


class ShardedInFolder(Sharded, OfRanks, RandomModel):
    """The same, sharded."""


class ShardedInFile(Sharded, OfRanks):
    """Sharded, and nothing is random."""


MODELS = {"ddp": Replicated, "fsdp2": ShardedInFile, "folder": ShardedInFolder}


def callbacks_of(kind: str) -> list[Any]:
    average = WeightAveraging(EMA(0.8) if kind == "ddp" else LAWA(3), buffers="average")
    return [
        *([ExactResume()] if issubclass(MODELS[kind], RandomModel) else []),
        EarlyStopping("val_score", patience=9),
        GradientMonitor(),
        GradientClipping([AutoClip(70.0), Noise(0.1)]),
        GradientAccumulation(2, weight_by="sample"),
        average,
        WeightAveraging(EMA(0.6), evaluate=False, apply_at_end=False, name="beside"),
    ]


class Run:
    """A run of one rank."""

    def __init__(self, kind: str, moment: runs.Moment | None = None) -> None:
        self.callbacks = callbacks_of(kind)
        self.is_random = issubclass(MODELS[kind], RandomModel)
        self.module: Any = MODELS[kind](scores=SCORES, norm=self.is_random)
        self.recorder = runs.Recorder()
        strategy: Any = DDPStrategy(broadcast_buffers=False)
        if kind != "ddp":
            registry.run.share_mesh()
            strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=kind == "folder")
        self.trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            plugins=[registry.run.LivingEnvironment()],
            use_distributed_sampler=False,
            callbacks=[*self.callbacks, *([] if moment is None else [moment])],
            max_epochs=EPOCHS,
            val_check_interval=VALIDATE_EVERY,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=self.recorder,
            enable_checkpointing=moment is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def fit(self, path: Path | None = None) -> None:
        seed = 10 * dist.get_rank() + (1 if path is None else 2)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.trainer.fit(self.module, ckpt_path=path, weights_only=True)

    def now(self) -> dict[str, Any]:
        momentum = [state["momentum_buffer"] for opt in self.trainer.optimizers for state in opt.state.values()]
        return whole_tensors({"weights": weights_of(self.module), "momentum": momentum, "read": self.read()})

    def read(self) -> list[dict[str, Any]]:
        return [whole_tensors(runs.read(callback, self.module)) for callback in self.callbacks]

    def end(self, position: int) -> dict[str, Any]:
        logged = {
            name: {step: value for step, value in values.items() if step > position}
            for name, values in self.recorder.logged.items()
        }
        end = {
            "final": weights_of(self.module),
            "raw": self.module.raw,
            "validations": self.module.validations,
            "logged": logged,
            "draws": [torch.rand(1).item(), random.random(), np.random.rand()] if self.is_random else [],
            "drift": getattr(self.module, "drift", None),
        }
        return whole_tensors(end) | {"read": self.read()}


def whole_tensors(tree: Any) -> Any:
    """A copy with sharded tensors gathered; all ranks call this."""
    if isinstance(tree, dict):
        return {key: whole_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [whole_tensors(value) for value in tree]
    return tree.full_tensor().clone() if isinstance(tree, DTensor) else runs.copied(tree)


def uninterrupted(kind: str, path: Path | None = None) -> dict[str, Any]:
    """The whole run: what it was at the moment of the file, which is written if a path is given, and its end."""
    there: dict[str, Any] = {}

    def look(trainer: Trainer, module: Any) -> None:
        if path is not None:
            trainer.save_checkpoint(path)
        there.update(run.now(), position=trainer.fit_loop.epoch_loop._batches_that_stepped)

    with isolate_rng():
        run = Run(kind, runs.Moment(AFTER, look))
        run.fit()
        return {"there": there, "end": run.end(there["position"])}


def resumed(kind: str, path: Path, position: int) -> dict[str, Any]:
    """The end of the rest of the run."""
    with isolate_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a state that was taken away
        run = Run(kind)
        run.fit(path)
        return run.end(position)


def lose(key: str, path: Path, beside: Path) -> None:
    """Copy a checkpoint, without what one callback remembers."""
    if path.is_dir():
        shutil.copytree(path, beside, dirs_exist_ok=True)
    head = path / "meta.pt" if path.is_dir() else path
    checkpoint = torch.load(head, weights_only=True)
    del checkpoint["callbacks"][key]
    for name in ("averaging_state", "current_model_state"):
        checkpoint.pop(name, None)
    torch.save(checkpoint, beside / "meta.pt" if path.is_dir() else beside)


def keys_in(path: Path) -> list[str]:
    """The callbacks whose state is in a checkpoint."""
    return list(torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)["callbacks"])


def unpack(kind: str, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Put a checkpoint into a folder; what each rank was and ended as."""
    shutil.unpack_archive(runs.HERE / f"{kind}.tar.xz", folder, filter="data")
    return folder / f"{kind}.ckpt", runs.unpack_end(kind)["ranks"]
