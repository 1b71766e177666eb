"""Fits that are running, whose hooks of one optimizer step are called and timed by the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer import call
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim import OptimCallback


class Model(LightningModule):
    """Parameters that several fits share, and a training step that is given from outside."""

    def __init__(self, parameters: Iterable[nn.Parameter], act: Callable[[Model], None]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weights = nn.ParameterList(parameters)
        self.act = act

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.act(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> list[int]:
        return [0]


class Hooks:
    """A running fit, of which the hooks of one optimizer step are called."""

    def __init__(self, module: Model) -> None:
        self.trainer, self.module = module.trainer, module
        self.optimizer = module.trainer.optimizers[0]
        self.callbacks: Any = self.trainer.callbacks

    def __call__(self) -> None:
        sessions = {callback.session for callback in self.callbacks if isinstance(callback, OptimCallback)}
        for session in sessions:
            session._steps[self.optimizer] = None  # as within `strategy.optimizer_step`: the step is under way
        call._call_callback_hooks(self.trainer, "on_before_optimizer_step", self.optimizer)
        for session in sessions:
            session._about_to_step(self.optimizer)
            session._stepped(self.optimizer)
        call._call_callback_hooks(self.trainer, "on_train_batch_end", None, 0, 0)


def within_fits(
    fits: list[tuple[list[Callback], int]],
    parameters: list[nn.Parameter],
    run: Callable[[list[Hooks]], None],
    hooks: tuple[Hooks, ...] = (),
) -> None:
    """Start one fit within the training step of another, and call ``run`` with the hooks of all."""
    if not fits:
        run(list(hooks))
        return
    (callbacks, log_every), *others = fits
    module = Model(parameters, lambda module: within_fits(others, parameters, run, (*hooks, Hooks(module))))
    Trainer(
        accelerator="cpu",
        max_steps=1,
        max_epochs=1,
        callbacks=callbacks,
        log_every_n_steps=log_every,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module)


class Counting(TorchDispatchMode):
    """Counts torch operations."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(contestant: Callable[[], Any]) -> int:
    with Counting() as counting:
        contestant()
    return counting.count
