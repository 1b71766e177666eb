"""Capture the state of a run in memory between two steps, and restore it in place."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.copied_state import copied_state
from lightning_optim.runtime.interrupts import uninterrupted
from lightning_optim.runtime.lightning import Callback, Trainer, strategies
from lightning_optim.runtime.lightning.loops import window_is_open
from lightning_optim.runtime.lightning.modules import running_hook, set_running_hook
from lightning_optim.runtime.lightning.precision import scaler_of
from lightning_optim.runtime.logged_values import epoch_sums, set_epoch_sums_
from lightning_optim.runtime.object_state import LeftAlone, ObjectState
from lightning_optim.runtime.random_state import rank_random_state, set_rank_random_state_
from lightning_optim.runtime.session import Session, SessionState


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class RunState(LeftAlone):
    """Hold the state of a run that :func:`capture` took, to be put back by :func:`restore_`, once or many times.

    It belongs to the fit in which it was taken, and shares no memory with the run.

    Attributes:
        global_step: ``trainer.global_step`` at that moment.
        owners: The module, the optimizers and what else lasts as long as the fit, by which the fit is known.
        callbacks: The callbacks whose state is in it.
        optimizers: Each optimizer with its ``state`` and ``param_groups``; ``load_state_dict`` binds new ones.
        objects: Contents of the module, the optimizers and callbacks of this package; of sharded tensors the shards.
        stateful: Learning-rate schedulers, the GradScaler, Lightning's counts of steps and other callbacks, each with a
            copy of its ``state_dict()``.
        random: Random state of this rank.
        broadcasts: True if DDP broadcasts buffers at the next forward; ``None`` without DDP.
        logged: Sums of what is logged as a mean over the running epoch.
    """

    global_step: int
    owners: list[Any]
    callbacks: list[Callback]
    optimizers: list[tuple[Optimizer, Any, Any]]
    objects: ObjectState
    stateful: list[tuple[_Stateful, dict[str, Any]]]
    random: dict[str, Any]
    broadcasts: bool | None
    logged: dict[str, Any]


def capture(
    trainer: Trainer,
    device: torch.device | str | None = None,
    callbacks: Collection[Callback] | None = None,
) -> RunState:
    """Copy everything on which the coming steps of a run depend, except the data.

    This is the state of the module (weights, all buffers, attributes, metrics), of optimizers, learning-rate
    schedulers, the GradScaler, callbacks (averages, norm histories, …) and random generators, the counts of optimizer
    steps, and the sums of values that were logged in the epoch. The position in the data and Lightning's counts of
    batches and epochs are not included: after :func:`restore_` the data go on. Gradients are not copied, so no
    accumulation window may be open.

    Nothing is gathered: under FSDP2 each rank keeps its shards. Call it on all ranks.

    Args:
        trainer: A Trainer that fits, in a hook between two steps: ``on_train_batch_start``, ``on_train_batch_end``,
            ``on_train_epoch_start`` or ``on_train_epoch_end``.
        device: Device of the copies of tensors; ``"cpu"`` saves memory of the accelerator. Default: that of each.
        callbacks: The callbacks whose state is included. Default: all. Leave out callbacks whose memory must not go
            back, such as a ``ModelCheckpoint``, which remembers the checkpoints that it wrote.

    Raises:
        RuntimeError: In a validation or in ``averaged_weights``, where the module may hold an average, within a step,
            while an accumulation window is open, after an exception, or outside of a fit.

    Example::

        >>> from lightning.pytorch import Callback, Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class GoBackOnce(Callback):
        ...     def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ...         if batch_idx == 1:
        ...             self.state = capture(trainer)
        ...         if batch_idx == 3:
        ...             restore_(trainer, self.state)
        >>> trainer = Trainer(callbacks=[GoBackOnce()], max_epochs=1, limit_train_batches=5, barebones=True)
        >>> trainer.fit(BoringModel())
        >>> trainer.global_step
        3
    """
    _check_moment(trainer)
    listed = [callback for callback in trainer.callbacks if callbacks is None or callback in callbacks]
    ours = [callback for callback in listed if isinstance(callback, OptimCallback)]
    objects: dict[str, Any] = {"module": trainer.lightning_module}
    for index, optimizer in enumerate(trainer.optimizers):
        objects[f"optimizers[{index}].state"] = optimizer.state
        objects[f"optimizers[{index}].param_groups"] = optimizer.param_groups
    objects |= {f"callbacks[{trainer.callbacks.index(callback)}]": callback for callback in ours}
    stateful: list[_Stateful] = [*_counts(trainer), *(config.scheduler for config in trainer.lr_scheduler_configs)]
    stateful += [callback for callback in listed if callback not in ours]
    if (scaler := scaler_of(trainer)) is not None:
        stateful.append(scaler)
    return RunState(
        trainer.global_step,
        [trainer.lightning_module, *trainer.optimizers, *(each for each in stateful if each not in listed)],
        listed,
        [(optimizer, optimizer.state, optimizer.param_groups) for optimizer in trainer.optimizers],
        ObjectState(objects, device, with_package=True),
        [(each, copied_state(each.state_dict(), device)) for each in stateful],
        rank_random_state(trainer),
        strategies.broadcast_is_due(trainer),
        epoch_sums(trainer),
    )


def restore_(trainer: Trainer, state: RunState) -> list[str]:
    """Restore a state that :func:`capture` took in this fit, in place: values are copied into the same tensors.

    Training then goes on as from that moment, bit for bit, with the batches that come next. ``trainer.global_step``
    goes back; the step that loggers see does not. Gradients are dropped. Call it on all ranks, in a hook as
    :func:`capture`.

    If it fails, the run is put back to where it was before the call. For that, a second copy is on the CPU meanwhile.

    Args:
        trainer: The Trainer.
        state: The state, which stays as it is.

    Returns:
        The names of attributes that changed since and cannot be put back, such as an open connection.

    Raises:
        RuntimeError: As :func:`capture`, or if the state is of another fit, or an optimizer or a scheduler was replaced
            since.
    """
    before = capture(trainer, "cpu", state.callbacks)
    if len(before.owners) != len(state.owners) or not all(map(operator.is_, before.owners, state.owners)):
        raise RuntimeError(
            "The state cannot be restored: it was captured in another fit, or before an optimizer or a learning-rate"
            " scheduler was replaced. Capture a new one."
        )
    with uninterrupted():
        try:
            return _restore_(trainer, state)
        except BaseException:
            _restore_(trainer, before)
            raise


def _restore_(trainer: Trainer, state: RunState) -> list[str]:
    for optimizer, its_state, groups in state.optimizers:
        optimizer.state, optimizer.param_groups = its_state, groups
    with _running_hooks_kept(trainer):
        changed = state.objects.restore_()
    for each, saved in state.stateful:
        each.load_state_dict(copied_state(saved))
    set_epoch_sums_(trainer, state.logged)
    strategies.set_broadcast_is_due(trainer, state.broadcasts)
    set_rank_random_state_(trainer, state.random)
    return changed


@contextlib.contextmanager
def _running_hooks_kept(trainer: Trainer) -> Iterator[None]:
    """Context manager: keep what Lightning and this package note about the hooks that are running."""
    hook = running_hook(trainer.lightning_module)
    ours = [callback for callback in trainer.callbacks if isinstance(callback, OptimCallback)]
    notes = [callback._package_results for callback in ours]
    try:
        yield
    finally:
        set_running_hook(trainer.lightning_module, hook)
        for callback, note in zip(ours, notes, strict=True):
            callback._package_results = note


def _counts(trainer: Trainer) -> list[Any]:
    """Return Lightning's counts of optimizer steps and scheduler steps."""
    loop = trainer.fit_loop.epoch_loop
    return [
        loop.automatic_optimization.optim_progress,
        loop.manual_optimization.optim_step_progress,
        loop.scheduler_progress,
    ]


def _check_moment(trainer: Trainer) -> None:
    loop = trainer.fit_loop.epoch_loop
    steps = loop.automatic_optimization.optim_progress.optimizer.step, loop.manual_optimization.optim_step_progress
    session = Session.find(trainer)
    is_over = trainer.state.status != "running" or (session and session.state is SessionState.ENDED)
    if not trainer.training or is_over or any(step.total.ready != step.total.completed for step in steps):
        raise RuntimeError(
            "The state of a run is captured and restored between two steps of a fit: call it in `on_train_batch_start`,"
            " `on_train_batch_end`, `on_train_epoch_start` or `on_train_epoch_end`."
        )
    if any(callback.displaced() for callback in trainer.callbacks if isinstance(callback, OptimCallback)):
        raise RuntimeError(
            "The state of a run cannot be captured or restored while the module holds averaged weights: call it outside"
            " of `averaged_weights`."
        )
    windows = session.windows if session is not None else None
    if windows.is_open if windows is not None else window_is_open(trainer):
        raise RuntimeError(
            "The state of a run cannot be captured or restored while an accumulation window is open, since gradients"
            " are not part of it: call it at the end of a batch that has stepped."
        )
