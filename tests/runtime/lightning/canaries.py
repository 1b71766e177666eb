"""A canary is a test of one private name: it fails with a sentence when the name is gone or means something else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim.runtime.lightning.private_names import entry_of
from tests.lightning import Callback, LightningModule, Logger, Trainer

CANARIES: dict[str, Callable[[], None]] = {}
"""The test of each name."""


def canary(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a test of these names; if it fails, it says what is broken and where to mend it."""
    entries = [entry_of(name) for name in names]

    def register(test: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(test)
        def told() -> None:
            try:
                test()
            except (Exception, pytest.fail.Exception) as error:
                said = "; or ".join(entry.message() for entry in entries)
                raise AssertionError(f"{said}. The test saw {type(error).__name__}: {error}") from error

        for name in names:
            assert name not in CANARIES, name
            CANARIES[name] = told
        return told

    return register


class Written(Logger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[dict[str, float], int | None]] = []

    @property
    def name(self) -> str:
        return "written"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((dict(metrics), step))

    def steps_of(self, name: str) -> list[int | None]:
        return [step for metrics, step in self.metrics if name in metrics]


class Model(LightningModule):
    """Module whose batches are numbers, which it logs in training and, with other loaders, in validation."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net, self.options = nn.Linear(1, 1), options

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("value", batch.mean(), **self.options)
        return self.net(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("seen", batch.mean(), on_step=True, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class At(Callback):
    """Calls a function with the Trainer in one hook."""

    def __init__(self, hook: str, call: Callable[[Trainer], Any]) -> None:
        self.seen: list[Any] = []
        setattr(self, hook, lambda trainer, *args, **kwargs: self.seen.append(call(trainer)))


def numbers(count: int = 4, batch_size: int = 1) -> DataLoader[Tensor]:
    return DataLoader(torch.arange(float(count)).reshape(-1, 1), batch_size)  # type: ignore[arg-type]


def fit(
    model: LightningModule,
    *callbacks: Callback,
    training: Any = None,
    validation: Any = None,
    resume: str | None = None,
    **options: Any,
) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 1, "logger": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **defaults | options,
    )
    trainer.fit(model, numbers() if training is None else training, validation, ckpt_path=resume)
    return trainer
