"""Fit one cell, in this process or in a process of a living group, and collect the results."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from tests.harness import models
from tests.harness.cells import EPOCHS, INIT_SCALE, Cell
from tests.harness.reference_loop import Outcome
from tests.lightning import (
    Callback,
    Checkpoint,
    DDPStrategy,
    LightningEnvironment,
    Logger,
    MixedPrecision,
    ModelParallelStrategy,
    Strategy,
    Trainer,
    model_parallel,
)


class LivingEnvironment(LightningEnvironment):
    """Tell Lightning that the processes exist already, and the rank of this one."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return torch.distributed.get_world_size()

    def global_rank(self) -> int:
        return torch.distributed.get_rank()

    def local_rank(self) -> int:
        return torch.distributed.get_rank()


class Recorder(Logger):
    """Keep the logged values of each name by step."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, dict[int, float]] = {}

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, {})[step or 0] = float(value)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class SaveAfterBatch(Callback):
    """Write a checkpoint after the micro-batch ``batch``, counted from 0 over the whole run."""

    def __init__(self, path: str | Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch + 1:
            trainer.save_checkpoint(self.path)


def strategy_of(cell: Cell) -> str | Strategy:
    if cell.strategy == "ddp":
        # With two optimizers no loss reaches all the weights.
        return DDPStrategy(find_unused_parameters=cell.kind == "two")
    if cell.strategy == "fsdp2":
        share_mesh()
        return fsdp2()
    return "auto"


def fsdp2(save_distributed_checkpoint: bool = True) -> ModelParallelStrategy:
    """Return a strategy that shards over two processes; its checkpoints are folders of shards, or single files."""
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint
    )


def share_mesh() -> None:
    """Let the fits of a living group share one device mesh.

    Each mesh makes process groups, whose threads and open files live as long as the process.
    """
    if not hasattr(model_parallel._setup_device_mesh, "cache_info"):
        model_parallel._setup_device_mesh = functools.cache(model_parallel._setup_device_mesh)


def make_trainer(cell: Cell, callbacks: Sequence[Callback], **changes: Any) -> Trainer:
    """Make a Trainer for a cell that prints nothing; ``changes`` replace its arguments."""
    plugins: list[Any] = [LivingEnvironment()] if cell.processes > 1 else []
    if cell.precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE)
        plugins.append(MixedPrecision("16-mixed", "cpu", scaler))
    arguments: dict[str, Any] = dict(
        accelerator="cpu",
        devices=cell.processes,
        strategy=strategy_of(cell),
        plugins=plugins,
        precision=None if cell.precision == "16-mixed" else cell.precision,
        callbacks=list(callbacks),
        max_epochs=EPOCHS,
        val_check_interval=cell.validate_every,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return Trainer(**(arguments | changes))


def fit(cell: Cell, callbacks: Sequence[Callback], scores: Sequence[float] = (), **changes: Any) -> Outcome:
    """Train the cell's module with these callbacks and collect the results."""
    recorder = Recorder()
    trainer = make_trainer(cell, callbacks, **({"logger": recorder} | changes))
    module = models.build(cell, scores)
    trainer.fit(module)
    return Outcome(models.full_weights(module), module.raw, module.validations, module.seen, recorder.logged)
