"""Write checkpoints in another way than the Trainer's plugin does, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from lightning_optim.runtime.files.atomic_writing import write_atomically
from lightning_optim.runtime.lightning import CheckpointIO, Strategy


@contextmanager
def using_checkpoint_io(strategy: Strategy, writer: CheckpointIO) -> Iterator[None]:
    """Context manager: the strategy writes checkpoints with this plugin instead of its own."""
    own = strategy.checkpoint_io
    strategy.checkpoint_io = writer
    try:
        yield
    finally:
        strategy.checkpoint_io = own


class AtomicCheckpointIO:
    """Write a checkpoint with ``torch.save``, completely or not at all, before ``save_checkpoint`` returns."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with write_atomically(path) as beside, open(beside, "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError

    def remove_checkpoint(self, path: Any) -> NoReturn:
        raise NotImplementedError
