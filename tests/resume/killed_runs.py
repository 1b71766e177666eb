"""Runs that are killed: a callback that writes a checkpoint and kills its process, and fits in one process or two."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_optim.resume.exact_resume import ExactResume
from tests.harness.run import LivingEnvironment
from tests.lightning import Checkpoint, Logger, ModelParallelStrategy, Trainer, seed_everything
from tests.resume.models import Net, PositionLoader, ShardedNet


class Rows(Logger):
    """Adds what is logged to the module's events."""

    name, version = "rows", 0

    def __init__(self, events: list[list[Any]]) -> None:
        super().__init__()
        self.events = events

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.events.append(["row", step, dict(metrics)])

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class WriteAndDie(Checkpoint):
    """Write a checkpoint at the n-th call of a hook, as ModelCheckpoint would, and kill the process."""

    def __init__(self, hook: str, call: int, path: Path) -> None:
        self.calls, self.call, self.path = 0, call, path
        setattr(self, hook, self._write)

    def _write(self, trainer: Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        self.calls += 1
        if self.calls == self.call:
            trainer.save_checkpoint(self.path)
            os.kill(os.getpid(), signal.SIGKILL)


def outcome(module: Any, of: Trainer) -> dict[str, Any]:
    """Return everything that two runs must have in common, bit for bit."""
    momentum = [value["momentum_buffer"] for value in of.optimizers[0].state.values()]
    tensors = [p.detach() for p in module.parameters()] + [b.clone() for b in module.buffers()] + momentum
    return {"events": module.events, "tensors": [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]}


def difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Return the first difference between two outcomes; empty if they are equal."""
    for x, y in zip(a["events"], b["events"], strict=False):
        if repr(x) != repr(y):
            return f"{x} and {y}"
    if len(a["events"]) != len(b["events"]):
        return f"{len(a['events'])} and {len(b['events'])} events"
    same = all(torch.equal(x, y) for x, y in zip(a["tensors"], b["tensors"], strict=True))
    return "" if same else "weights or momentum"


def fit(
    callbacks: list[Any],
    loader: Callable[[], Any] = PositionLoader,
    path: Path | None = None,
    seed: int = 1,
    net: Callable[[], Net] = Net,
    **arguments: Any,
) -> dict[str, Any]:
    """Train a whole run, or the rest of one from a checkpoint."""
    seed_everything(seed, verbose=False)
    module = net()
    files = any(isinstance(callback, Checkpoint) for callback in callbacks)
    of = Trainer(
        callbacks=callbacks,
        enable_checkpointing=files,
        logger=Rows(module.events),
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        log_every_n_steps=1,
        **{"max_epochs": 3, "devices": 1, "val_check_interval": 3, **arguments},
    )
    of.fit(module, loader(), ckpt_path=path)
    return outcome(module, of)


def fit_of_two(
    strategy: str,
    hook: str | None,
    call: int,
    path: Path | None,
    resume: bool,
    exact: bool,
    loader: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Do the same in a process of a living group; ``hook`` is where to write a checkpoint and die."""
    rank = torch.distributed.get_rank()

    def net() -> Net:
        module = ShardedNet() if strategy == "fsdp2" else Net()
        torch.manual_seed(100 * resume + rank)  # the ranks draw differently
        return module

    callbacks: list[Any] = [ExactResume()] if exact else []
    if hook is not None:
        callbacks.append(WriteAndDie(hook, call, path))
    return fit(
        callbacks,
        loader or (lambda: PositionLoader(seed=10 * rank)),
        path if resume else None,
        seed=2 if resume else 1,
        net=net,
        devices=2,
        val_check_interval=3 if loader is None else 1.0,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else "ddp",
        plugins=[LivingEnvironment()],
    )
