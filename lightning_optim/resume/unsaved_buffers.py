"""Find and set buffers that no ``state_dict`` in a checkpoint holds: each rank's own, and non-persistent ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_optim.base import module_tensors, shards
from lightning_optim.base.module_registry import buffer_of, is_persistent, set_buffer
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import Trainer


class Buffers:
    """Find the plain buffers that a checkpoint must hold beside the module's ``state_dict``, by plain name.

    Lightning's checkpoints hold one rank's persistent buffers. Non-persistent buffers that change in training are state
    too; the rest, such as masks and position codes, the module makes by itself, and they may be large.

    Args:
        trainer: A Trainer at ``on_fit_start``.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        self._made = {
            name: (weakref.ref(buffer), shards.version(buffer))
            for name, owner, key, buffer in _present(trainer.lightning_module)
            if not is_persistent(owner, key)
        }

    def of_rank(self) -> dict[str, Tensor]:
        """Return live storage of all buffers that a checkpoint must hold, also of those that a callback has moved."""
        trainer = self._trainer()
        if trainer is None:
            return {}
        found = {
            name: buffer
            for name, owner, key, buffer in _present(trainer.lightning_module)
            if is_persistent(owner, key) or self._has_changed(name, buffer)
        }
        for callback in trainer.callbacks:
            displaced = callback.displaced() if isinstance(callback, OptimCallback) else {}
            found |= {name: tensor for name, tensor in displaced.items() if name in found}
        return found

    def unsaved(self) -> dict[str, Tensor]:
        """Return copies of the non-persistent buffers among them."""
        trainer = self._trainer()
        present = [] if trainer is None else list(_present(trainer.lightning_module))
        hidden = {name for name, owner, key, _ in present if not is_persistent(owner, key)}
        return {name: buffer.detach().cpu().clone() for name, buffer in self.of_rank().items() if name in hidden}

    def _has_changed(self, name: str, buffer: Tensor) -> bool:
        made, version = self._made.get(name, (lambda: None, 0))
        return made() is not buffer or version != shards.version(buffer)


@torch.no_grad()
def set_buffers_(trainer: Trainer, saved: dict[str, Tensor]) -> None:
    """Set buffers by plain name, in place where the shape is the same."""
    present = {name: (owner, key) for name, owner, key in module_tensors.buffer_places(trainer.lightning_module)}
    for name, value in saved.items():
        if name not in present:
            continue
        owner, key = present[name]
        live = buffer_of(owner, key)
        if live is None or live.shape != value.shape:
            device = trainer.strategy.root_device if live is None else live.device
            set_buffer(owner, key, value.to(device, copy=True))
        elif not torch.equal(live.cpu(), value):  # one that cannot be written, such as an expanded one, has not changed
            live.copy_(value)


def _present(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for name, owner, key in module_tensors.buffer_places(module):
        buffer = buffer_of(owner, key)
        if buffer is not None and not isinstance(buffer, DTensor):
            yield name, owner, key, buffer
