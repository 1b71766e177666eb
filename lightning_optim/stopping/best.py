"""The best weights so far: a copy in memory, or a whole checkpoint in a directory."""

from __future__ import annotations

import abc
import os
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_optim import tensors
from lightning_optim.fit import evaluated_state


class Keeper(abc.ABC):
    """Keeps the evaluated weights of one check, until better ones come."""

    @abc.abstractmethod
    def keep(self, trainer: Trainer) -> None:
        """Keep what a validation would use now. To be called on all ranks."""

    @property
    @abc.abstractmethod
    def has_best(self) -> bool:
        """Whether there is anything to restore."""

    @abc.abstractmethod
    def restore_(self, module: nn.Module) -> None:
        """Copy the best weights and buffers into ``module``, by name."""

    @abc.abstractmethod
    def extra_state(self, module: nn.Module | None) -> dict[str, Any]:
        """What a checkpoint must hold; DTensors for a sharded ``module``."""

    @abc.abstractmethod
    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take over what :meth:`extra_state` returned."""


class InMemory(Keeper):
    """A copy on the CPU, of this process's shards where the model is sharded. Each checkpoint grows by one model."""

    def __init__(self) -> None:
        self._best: dict[str, Tensor] = {}

    @property
    def has_best(self) -> bool:
        return bool(self._best)

    @torch.no_grad()
    def keep(self, trainer: Trainer) -> None:
        live = trainer.lightning_module.state_dict()
        for name, tensor in evaluated_state(trainer).items():
            if isinstance(tensor, Tensor):
                (shard,) = tensors.local([tensor])
                kept = self._best.get(name)
                if kept is None or kept.shape != shard.shape:
                    kept = self._best[name] = torch.empty(shard.shape, dtype=live[name].dtype, device="cpu")
                kept.copy_(shard)

    def restore_(self, module: nn.Module) -> None:
        tensors.reshard_(module)
        live = module.state_dict()
        for name, kept in self._best.items():
            (shard,) = tensors.local([live[name]])
            # The kept tensor is our shard, or the whole if it came from a file.
            target = shard if kept.shape == shard.shape else live[name]
            tensors.copy_(target, kept)

    def extra_state(self, module: nn.Module | None) -> dict[str, Any]:
        if module is None or not self._best:
            return {"best": dict(self._best)}
        live = module.state_dict()
        placed = {}
        for name, kept in self._best.items():
            (shard,) = tensors.local([live[name]])
            placed[name] = tensors.placed_as(kept.to(shard.device), live[name]) if kept.shape == shard.shape else kept
        return {"best": placed}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._best = {name: tensors.local([kept])[0].cpu() for name, kept in extra.get("best", {}).items()}


class InDirectory(Keeper):
    """A whole checkpoint, written beside and renamed, so that a kill leaves the one before or the new one.

    Args:
        directory: Where the file is written; made if it is not there.
        stem: The file's name without ``.ckpt``.

    Attributes:
        path: The file; empty before the first.
    """

    def __init__(self, directory: str, stem: str) -> None:
        self.directory, self.stem = directory, stem
        self.path = ""
        self._written = False

    @property
    def has_best(self) -> bool:
        return bool(self.path)

    def keep(self, trainer: Trainer) -> None:
        if not self.path:
            self.path = trainer.strategy.broadcast(self._free_path())
        beside = f"{self.path}.new"
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            _rename(beside, self.path)
        trainer.strategy.barrier("the best checkpoint is renamed")
        self._written = True

    def _free_path(self) -> str:
        """A name that no earlier run has used: its best is not ours to overwrite."""
        get_filesystem(self.directory).makedirs(self.directory, exist_ok=True)
        path, version = os.path.join(self.directory, f"{self.stem}.ckpt"), 0
        while get_filesystem(path).exists(path):
            version += 1
            path = os.path.join(self.directory, f"{self.stem}-v{version}.ckpt")
        return path

    @torch.no_grad()
    def restore_(self, module: nn.Module) -> None:
        tensors.reshard_(module)
        live = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
        path = self.path if get_filesystem(self.path).exists(self.path) else f"{self.path}.new"
        if os.path.isdir(path):
            dcp.load({"state_dict": live}, checkpoint_id=path)  # into the live storage, shard by shard
            return
        with get_filesystem(path).open(path, "rb") as file:
            # What this process wrote may hold any hyper-parameters; another's file may hold anything.
            saved = torch.load(file, map_location="cpu", weights_only=not self._written)["state_dict"]
        for name, tensor in live.items():
            key = name if name in saved else name.replace("_orig_mod.", "")
            if key in saved:
                tensors.copy_(tensor, saved[key])

    def extra_state(self, module: nn.Module | None) -> dict[str, Any]:
        return {"best_path": self.path}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self.path = extra.get("best_path", "")


def _rename(beside: str, path: str) -> None:
    filesystem = get_filesystem(path)
    if filesystem.isdir(path):
        # A folder cannot be replaced in one act; a kill in between leaves the new one, complete.
        filesystem.rm(path, recursive=True)
    filesystem.mv(beside, path, recursive=filesystem.isdir(beside))
