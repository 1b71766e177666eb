"""Ask a strategy how it writes checkpoints, launches processes and shares buffers, and change it for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lightning_optim.runtime.lightning import (
    AsyncCheckpointIO,
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
    Trainer,
)
from lightning_optim.runtime.lightning.packages import found
from lightning_optim.runtime.lightning.private_names import read_private, write_private
from lightning_optim.runtime.lightning.torch_internals import uncompiled

# ---- checkpoints -----------------------------------------------------------------------------------------------------


def writes_folders(strategy: Strategy) -> bool:
    """Return True if checkpoints are folders, into which each rank writes its shards."""
    return isinstance(strategy, ModelParallelStrategy) and read_private(strategy, "_save_distributed_checkpoint")


@contextlib.contextmanager
def writing_one_file(strategy: Strategy) -> Iterator[None]:
    """Context manager: a checkpoint is one file, of a sharded model too."""
    folders = writes_folders(strategy)
    if folders:
        write_private(strategy, "_save_distributed_checkpoint", False)
    try:
        yield
    finally:
        if folders:
            write_private(strategy, "_save_distributed_checkpoint", True)


def finish_writing(strategy: Strategy) -> None:
    """Wait until the checkpoints that are written in the background are complete."""
    if isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
        # `teardown` waits too, and before Lightning 2.5.6 no checkpoint can be written after it.
        executor = read_private(strategy.checkpoint_io, "_executor")
        if executor is not None:
            with contextlib.suppress(RuntimeError):  # shut down already, and so complete
                executor.submit(int).result()  # its only thread does this last


# ---- processes -------------------------------------------------------------------------------------------------------


def launches_processes(trainer: Trainer) -> bool:
    """Return True if the fit runs in new processes that only send results back (``ddp_spawn``, ``ddp_fork``)."""
    return isinstance(trainer.strategy.launcher, found("_MultiProcessingLauncher", "strategies.launchers"))


def without_reduction(strategy: Strategy, block: bool) -> contextlib.AbstractContextManager[Any]:
    """Context manager: a backward pass does not reduce gradients over ranks, if ``block``."""
    blocks = block and isinstance(strategy, ParallelStrategy)
    return strategy.block_backward_sync() if blocks else contextlib.nullcontext()


# ---- buffers ---------------------------------------------------------------------------------------------------------


def broadcasts_buffers(strategy: Strategy) -> bool:
    """Return True if DDP gives all ranks the buffers of rank 0. It can be asked before DDP wraps the model."""
    return isinstance(strategy, DDPStrategy) and bool(
        read_private(strategy, "_ddp_kwargs").get("broadcast_buffers", True)
    )


def share_buffers_(trainer: Trainer) -> None:
    """Broadcast rank 0's buffers if DDP would at the next forward: it does so at the first one after a backward."""
    model = _ddp(trainer)
    if model is not None and read_private(model, "_check_sync_bufs_pre_fwd")():
        read_private(model, "_sync_buffers")()


def broadcast_is_due(trainer: Trainer) -> bool | None:
    """Return True if DDP's next forward broadcasts buffers: the first after a backward does; ``None`` without DDP."""
    model = _ddp(trainer)
    return None if model is None else model.require_forward_param_sync


def set_broadcast_is_due(trainer: Trainer, due: bool | None) -> None:
    """Set the answer of :func:`broadcast_is_due`; a no-op without DDP, or for ``None``."""
    model = _ddp(trainer)
    if model is not None and due is not None:
        model.require_forward_param_sync = due


def _ddp(trainer: Trainer) -> DistributedDataParallel | None:
    model = uncompiled(trainer.strategy.model)
    return model if isinstance(model, DistributedDataParallel) else None


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def forget_forward(module: nn.Module) -> None:
    """Reset FSDP2 after a forward pass that an error ended, or it takes the next forward for a part of that one.

    A no-op in versions of torch in which FSDP2 has no such method.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule) and hasattr(submodule, "reset_iter_state"):
            with contextlib.suppress(RuntimeError):  # raised by all modules but the root
                submodule.reset_iter_state()
