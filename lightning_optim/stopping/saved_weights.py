"""The weights of a checkpoint that Lightning wrote: a file, or a folder of shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optim.base import module_tensors, shards
from lightning_optim.runtime.files import safe_reading
from lightning_optim.runtime.files.sharded_reading import load_folder, reader_of

_PREFIX = "state_dict."


@dataclass
class SavedWeights:
    """The ``state_dict`` of a checkpoint.

    Attributes:
        shapes: Plain name to the shape of the whole tensor.
        copy_into_: Copies the tensors of these names into the given ones, whole tensors into shards too.
    """

    shapes: dict[str, torch.Size]
    copy_into_: Callable[[Mapping[str, Tensor]], None]

    @staticmethod
    def at(path: str, live: Mapping[str, Tensor], weights_only: bool) -> SavedWeights:
        """Open a checkpoint for a module with these tensors."""
        return _folder(path, weights_only) if os.path.isdir(path) else _file(path, live, weights_only)


def _file(path: str, live: Mapping[str, Tensor], weights_only: bool) -> SavedWeights:
    loaded = safe_reading.load(path, weights_only)["state_dict"]
    named = {module_tensors.plain_name(name): tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
    saved = with_pruning_applied(named, live)

    def copy_into_(targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            shards.copy_(target, saved[name])

    return SavedWeights({name: tensor.shape for name, tensor in saved.items()}, copy_into_)


def _folder(path: str, weights_only: bool) -> SavedWeights:
    entries = reader_of(path, weights_only).read_metadata().state_dict_metadata
    keys = {key.removeprefix(_PREFIX): entry for key, entry in entries.items() if key.startswith(_PREFIX)}
    shapes = {key: entry.size for key, entry in keys.items() if hasattr(entry, "size")}
    names = {module_tensors.plain_name(key): key for key in shapes}

    def copy_into_(targets: Mapping[str, Tensor]) -> None:
        # Into the live storage, shard by shard.
        load_folder({"state_dict": {names[name]: target for name, target in targets.items()}}, path, weights_only)

    return SavedWeights({name: shapes[key] for name, key in names.items()}, copy_into_)


def with_pruning_applied(held: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the held tensors for a module whose pruning was made permanent since: weights times their masks."""
    names = {name.removesuffix("_orig") for name in held if name.endswith("_orig") and name not in live}
    pruned = {name for name in names if name in live and f"{name}_mask" in held}
    products = {name: held[f"{name}_orig"] * held[f"{name}_mask"] for name in pruned}
    parts = {f"{name}{part}" for name in pruned for part in ("_orig", "_mask")}
    return {name: kept for name, kept in held.items() if name not in parts} | products
