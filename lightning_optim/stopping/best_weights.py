"""Keep the best weights so far: in memory, or as a checkpoint in a directory."""

from __future__ import annotations

import abc
import contextlib
import os
import re
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.base import module_tensors, shards
from lightning_optim.runtime.cpu_copies import copy_to_cpu, from_checkpoint, matching_names, swap_, with_local_shards
from lightning_optim.runtime.evaluated_weights import evaluated_state
from lightning_optim.runtime.files.checkpoint_io import using_checkpoint_io
from lightning_optim.runtime.files.filesystems import filesystem_of
from lightning_optim.runtime.files.own_files import OwnFiles, resolved
from lightning_optim.runtime.files.saved_weights import SavedWeights
from lightning_optim.runtime.files.unused_path import unused_path
from lightning_optim.runtime.interrupts import uninterrupted
from lightning_optim.runtime.lightning import AsyncCheckpointIO, Strategy, Trainer, rank_zero_warn
from lightning_optim.runtime.raw_weights import RawWeights


class BestWeights(RawWeights, abc.ABC):
    """Keep the weights of the best validation, and the raw weights once the best ones are restored.

    Attributes:
        left_out: Plain names of frozen parameters that checkpoints leave out; the best leaves them out too.
        path: Path of the best checkpoint; empty for memory, and before the first.
    """

    path: str = ""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: set[str] = set()

    @abc.abstractmethod
    def store(self, trainer: Trainer, left_out: Iterable[str] = ()) -> None:
        """Store the weights that a validation would use now. Call it on all ranks.

        Args:
            trainer: The running Trainer.
            left_out: Plain names of the frozen tensors that checkpoints leave out; the same on all ranks.
        """

    @property
    def location(self) -> str:
        """Directory of the best checkpoint, resolved; empty for memory."""
        return ""

    @property
    @abc.abstractmethod
    def has_best(self) -> bool:
        """True if there are weights to restore."""

    @abc.abstractmethod
    def copy_into_(self, module: nn.Module) -> None:
        """Copy the best weights and buffers into ``module``, by name; warn of those that do not fit."""

    @abc.abstractmethod
    def _restore_(self, module: nn.Module, live: dict[str, Tensor]) -> None:
        """Write the best weights into the module's tensors, and keep their raw values in ``_raw``."""

    def add_unfrozen(self) -> None:
        """Copy parameters that were left out as frozen and train now; call it before the first step that moves them."""

    @torch.no_grad()
    def restore_(self, module: nn.Module) -> None:
        """Put the best weights into the trained module and keep the raw ones; warn of those that do not fit."""
        if self._in_module:
            self.copy_into_(module)
            return
        shards.reshard_(module)
        live = module_tensors.writable_tensors(module)
        with uninterrupted():
            self._restore_(module, live)
        self._in_module, self._module = True, weakref.ref(module)

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "left_out": sorted(self.left_out)}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        super().load_extra_state(extra)
        self.left_out = set(extra.get("left_out", ()))


class BestInMemory(BestWeights):
    """Keep a copy on the CPU; of a sharded model each rank keeps its shards. Each checkpoint grows by one model."""

    def __init__(self) -> None:
        super().__init__()
        self._best: dict[str, Tensor] = {}  # the best weights that are not in the module
        self._restored: dict[str, Tensor] = {}  # the module's tensors that hold the other best weights
        self._versions: dict[str, int] = {}  # versions of these tensors when the best was restored
        self._frozen: dict[str, Tensor] = {}  # the module's parameters that are left out

    @property
    def has_best(self) -> bool:
        return bool(self._best) or self._in_module

    @torch.no_grad()
    def store(self, trainer: Trainer, left_out: Iterable[str] = ()) -> None:
        module = trainer.lightning_module
        evaluated = {module_tensors.plain_name(name): tensor for name, tensor in evaluated_state(trainer).items()}
        live = module_tensors.writable_tensors(module)
        self._leave_out(live, left_out)
        live = {name: tensor for name, tensor in live.items() if name not in self.left_out}
        with uninterrupted():
            self._best = copy_to_cpu(live, evaluated, self._best)
        self._module = weakref.ref(module)

    def _leave_out(self, live: dict[str, Tensor], names: Iterable[str]) -> None:
        # Only parameters: the statistics of a frozen module may change with each batch.
        parameters = {name: live[name] for name in names if isinstance(live.get(name), nn.Parameter)}
        self._frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}
        self.left_out = set(self._frozen)

    @torch.no_grad()
    def add_unfrozen(self) -> None:
        unfrozen = {name: parameter for name, parameter in self._frozen.items() if parameter.requires_grad}
        if unfrozen:
            self._best |= copy_to_cpu(unfrozen, unfrozen, {})
            self._frozen = {name: p for name, p in self._frozen.items() if name not in unfrozen}
            self.left_out = set(self._frozen)

    @torch.no_grad()
    def copy_into_(self, module: nn.Module) -> None:
        if self._in_module and self.is_of(module):
            self._warn_if_changed()
            return
        shards.reshard_(module)
        live = module_tensors.writable_tensors(module)
        best = with_pruning_applied({**_local(self._restored), **self._best}, live)
        fits = matching_names(live, best)
        for name in fits:
            (shard,) = shards.local_shards([live[name]])
            # The kept tensor is this rank's shard, or the whole tensor if it came from a checkpoint.
            shards.copy_(shard if best[name].shape == shard.shape else live[name], best[name])
        _warn_of_mismatches(module, live, best, fits)

    def _warn_if_changed(self) -> None:
        changed = [name for name, tensor in self._restored.items() if self._versions[name] != shards.version(tensor)]
        if changed:
            rank_zero_warn(
                f"The module holds the best weights since the fit ended, and {_first_names(changed)} have been changed"
                " since: their best values are lost. Pass `dirpath=` to keep the best in a checkpoint."
            )

    def _restore_(self, module: nn.Module, live: dict[str, Tensor]) -> None:
        best = with_local_shards(with_pruning_applied(self._best, live), live)
        fits = matching_names(live, best)
        _warn_of_mismatches(module, live, best, fits)
        self._best = {name: kept for name, kept in best.items() if name not in fits}
        self._raw = swap_(live, {name: best[name] for name in fits})
        self._restored = {name: live[name] for name in fits}
        self._versions = {name: shards.version(tensor) for name, tensor in self._restored.items()}

    def _put_raw_in_(self, live: dict[str, Tensor]) -> None:
        moved = {name: self._raw[name] for name in matching_names(live, self._raw)}
        unmoved = {name: live[name] for name in live.keys() - moved.keys() - self._best.keys() - self.left_out}
        self._best = self._best | copy_to_cpu(unmoved, unmoved, {}) | swap_(live, moved)
        self._restored, self._versions = {}, {}

    @torch.no_grad()
    def resume_(self, module: nn.Module) -> None:
        super().resume_(module)
        live = module_tensors.writable_tensors(module)
        self._best = with_local_shards(self._best, live)
        self._leave_out(live, self.left_out)

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "best": self._sharded(self._best)}

    def rank_state(self) -> dict[str, Tensor]:
        return super().rank_state() | self._buffers_of("best", self._best)

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        super().load_extra_state(extra)
        self._best = from_checkpoint(extra.get("best", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Return the content of a copy, which holds the best weights itself."""
        restored = {name: shard.detach().clone() for name, shard in _local(self._restored).items()}
        return {**super().__getstate__(), "_restored": restored, "_versions": {}, "_frozen": {}}


class BestInDirectory(BestWeights):
    """Keep a whole checkpoint in a directory. A new one replaces it by renaming, so a kill leaves one of the two.

    Args:
        directory: The directory; created if it does not exist.
        stem: The name of the checkpoint without ``.ckpt``.
        own_files: Checkpoints that this process wrote, which may be unpickled; any other is read as untrusted.
    """

    def __init__(self, directory: str, stem: str, own_files: OwnFiles) -> None:
        super().__init__()
        self.directory, self.stem, self._own_files = directory, stem, own_files

    @property
    def location(self) -> str:
        return resolved(self.directory).rstrip("/") or "/"

    @property
    def has_best(self) -> bool:
        return bool(self.path)

    def store(self, trainer: Trainer, left_out: Iterable[str] = ()) -> None:
        if not self._may_replace(self.path):
            filesystem_of(self.directory).makedirs(self.directory, exist_ok=True)
            self.path = unused_path(self.directory, self.stem)
        self.path = trainer.strategy.broadcast(self.path)
        new = f"{self.path}.new"
        with _synchronous_writing(trainer.strategy):
            trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            _rename(new, self.path)
        trainer.strategy.barrier("the best checkpoint is renamed")
        self._own_files.rename(new, self.path)
        self._module = weakref.ref(trainer.lightning_module)

    def _may_replace(self, path: str) -> bool:
        """Return True if this run, or an earlier part of it, wrote ``path``: a loaded checkpoint may name any file."""
        directory, name = os.path.split(path)
        is_named_so = re.fullmatch(rf"{re.escape(self.stem)}(-v\d+)?\.ckpt", name)
        return path in self._own_files or (bool(is_named_so) and resolved(directory) == self.location)

    @torch.no_grad()
    def copy_into_(self, module: nn.Module) -> None:
        shards.reshard_(module)
        live = module_tensors.writable_tensors(module)
        saved, fits = self._open(live)
        saved.copy_into_({name: live[name] for name in fits})
        _warn_of_mismatches(module, live, saved.shapes, fits)

    def _open(self, live: dict[str, Tensor]) -> tuple[SavedWeights, list[str]]:
        path = self.path if filesystem_of(self.path).exists(self.path) else f"{self.path}.new"
        prune = partial(with_pruning_applied, live=live)
        saved = SavedWeights.open(path, path not in self._own_files, prune)
        return saved, [name for name, shape in saved.shapes.items() if name in live and live[name].shape == shape]

    def _restore_(self, module: nn.Module, live: dict[str, Tensor]) -> None:
        saved, fits = self._open(live)
        targets = {name: live[name] for name in fits}
        self._raw = copy_to_cpu(targets, targets, {})
        try:
            saved.copy_into_(targets)
        except BaseException:
            swap_(targets, self._raw)
            self._raw = {}
            raise
        _warn_of_mismatches(module, live, saved.shapes, fits)

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "best_path": self.path}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        super().load_extra_state(extra)
        self.path = extra.get("best_path", "")


# ---- a module that has changed since ---------------------------------------------------------------------------------


def with_pruning_applied(held: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the held tensors for a module whose pruning was made permanent since: weights times their masks."""
    names = {name.removesuffix("_orig") for name in held if name.endswith("_orig") and name not in live}
    pruned = {name for name in names if name in live and f"{name}_mask" in held}
    products = {name: held[f"{name}_orig"] * held[f"{name}_mask"] for name in pruned}
    parts = {f"{name}{part}" for name in pruned for part in ("_orig", "_mask")}
    return {name: kept for name, kept in held.items() if name not in parts} | products


def _warn_of_mismatches(module: nn.Module, live: dict[str, Tensor], held: Iterable[str], fits: Iterable[str]) -> None:
    """Warn of held tensors that do not fit the module, and of tensors of the module that are not held."""
    kept = set(held)
    named = {module_tensors.plain_name(name) for name in module_tensors.named_tensors(module)}
    mismatches = {
        "no longer in the module": kept - named,
        "not in the best weights": live.keys() - kept - module_tensors.frozen_names(module),
        "with another shape now": (kept & live.keys()) - set(fits),
    }
    if listed := "; ".join(f"{kind}: {_first_names(names)}" for kind, names in mismatches.items() if names):
        rank_zero_warn(f"Not all of the best weights are restored: {listed}. The rest of the module is left as it is.")


def _first_names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return f"{ordered[:8]}{more}"


def _local(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(named, shards.local_shards(named.values()), strict=True))


# ---- files -----------------------------------------------------------------------------------------------------------


def _synchronous_writing(strategy: Strategy) -> contextlib.AbstractContextManager[None]:
    """Context manager: a checkpoint is complete when ``save_checkpoint`` returns, also under `AsyncCheckpointIO`."""
    writer = strategy.checkpoint_io
    if not isinstance(writer, AsyncCheckpointIO) or writer.checkpoint_io is None:
        return contextlib.nullcontext()
    return using_checkpoint_io(strategy, writer.checkpoint_io)


def _rename(new: str, path: str) -> None:
    filesystem = filesystem_of(path)
    if filesystem.isdir(path):
        # A folder cannot be replaced in one operation; a kill in between leaves the new one, complete.
        filesystem.rm(path, recursive=True)
    filesystem.mv(new, path, recursive=filesystem.isdir(new))
