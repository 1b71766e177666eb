"""Jobs for this process or for forked ones: an uninterrupted run, one that is killed, and one that is resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_optim import GradientAccumulation
from lightning_optim.resume.exact_resume import ExactResume
from tests.harness.cells import Cell
from tests.harness.run import fsdp2
from tests.integration.entry_fits import Fitted, KeepsHistory, differences, fit
from tests.integration.forked_processes import die_together
from tests.lightning import Callback, Checkpoint, ModelCheckpoint, ModelParallelStrategy, Trainer
from tests.registry import BY_NAME

KILLED = 10  # The micro-batch in which the process is killed, in the middle of the second epoch.
INSIDE = 6  # The first micro-batch of a window, whatever the window's size.
VALIDATING = 8  # A micro-batch within a window; a validation follows the checkpoint that is written after it.


@dataclass(frozen=True)
class Case:
    """An entry in a cell; ``distributed`` is True if checkpoints after steps are folders of shards, under FSDP2."""

    name: str
    cell: Cell
    distributed: bool = False

    def options(self) -> dict[str, Any]:
        return {"strategy": fsdp2(self.distributed)} if self.cell.strategy == "fsdp2" else {}


class SaveInWindowsAndDie(Checkpoint):
    """Write checkpoints within windows, and kill the process when a later batch begins.

    Under FSDP2 they are folders if the checkpoints after steps are single files, and the other way round.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        name = {INSIDE + 1: "inside", VALIDATING + 1: "validating"}.get(pl_module.seen)
        if name is not None:
            (accumulation,) = (cb for cb in trainer.callbacks if isinstance(cb, GradientAccumulation))
            assert accumulation.is_open
            with other_kind(trainer.strategy):
                trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.seen == KILLED - 1:
            die_together(self.folder, trainer.global_rank, trainer.world_size)


@contextmanager
def other_kind(strategy: Any) -> Iterator[None]:
    """Context manager: FSDP2 writes single files in place of folders, and the other way round."""
    if isinstance(strategy, ModelParallelStrategy):
        strategy._save_distributed_checkpoint = not strategy._save_distributed_checkpoint
    yield
    if isinstance(strategy, ModelParallelStrategy):
        strategy._save_distributed_checkpoint = not strategy._save_distributed_checkpoint


def savers(folder: Path) -> tuple[Callback, ...]:
    """Return callbacks that write checkpoints after each step and within windows; the last is ``validating.ckpt``."""
    steps = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
    return steps, SaveInWindowsAndDie(folder)


@dataclass
class Run:
    """Results of a run, to be compared bit for bit.

    Attributes:
        began: Number of the step, as loggers count them, at which the run began or resumed.
    """

    outcome: dict[str, Any]
    momentum: list[Any]
    states: dict[str, Any]
    logged: dict[str, dict[int, float]]
    began: int

    @staticmethod
    def of(fitted: Fitted) -> Run:
        outcome = {name: value for name, value in vars(fitted.outcome).items() if name != "logged"}
        module = fitted.module
        return Run(outcome, module.momentum, module.states, fitted.logged, module.began)


class KeepsFirstStep(KeepsHistory):
    """Trait: also keep the step, as loggers count them, at which training began."""

    def on_train_start(self: Any) -> None:
        self.began = self.trainer.fit_loop.epoch_loop._batches_that_stepped


def uninterrupted(case: Case) -> Run:
    return Run.of(fit(BY_NAME[case.name], case.cell, KeepsFirstStep, extra=(ExactResume(),), **case.options()))


def killed(case: Case, folder: Path) -> None:
    extra = (ExactResume(), *savers(folder))
    fit(BY_NAME[case.name], case.cell, KeepsFirstStep, extra=extra, enable_checkpointing=True, **case.options())


def resumed(case: Case, path: Path, exact: bool = True, **options: Any) -> Run:
    extra = (ExactResume(),) if exact else ()
    options |= {"ckpt_path": path, "weights_only": True, **case.options()}
    return Run.of(fit(BY_NAME[case.name], case.cell, KeepsFirstStep, extra=extra, **options))


def resumed_from(case: Case, paths: list[Path]) -> list[Run]:
    """Run once without interruption, then once from each checkpoint, in processes that did not write them."""
    return [uninterrupted(case), *(resumed(case, path) for path in paths)]


def assert_same_run(run: Run, whole: Run, exact: bool = True) -> None:
    for what in ("outcome", "momentum", "states"):
        assert not differences(getattr(run, what), getattr(whole, what)), what
    for name, values in whole.logged.items():
        ours = run.logged.get(name, {})
        assert {position: values[position] for position in ours} == ours, name
        # Lightning by itself forgets the values of the batch after which the checkpoint was written.
        assert not exact or ours.keys() >= {position for position in values if position > run.began}, name
