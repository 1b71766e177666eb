"""Copy the weights of a checkpoint that Lightning wrote, a file or a folder of shards, into tensors, by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_optim.base import module_tensors, shards
from lightning_optim.runtime.files import safe_reading
from lightning_optim.runtime.files.sharded_reading import load_folder, reader_of

_PREFIX = "state_dict."


@dataclass(frozen=True)
class SavedWeights:
    """Describe the ``state_dict`` of a checkpoint.

    Attributes:
        shapes: Shape of the whole tensor for each plain name.
        copy_into_: Function that copies the saved tensors into those that it gets by name, also into shards.
    """

    shapes: dict[str, torch.Size]
    copy_into_: Callable[[Mapping[str, Tensor]], None]

    @staticmethod
    def open(
        path: str, weights_only: bool, adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    ) -> SavedWeights:
        """Open a checkpoint.

        Args:
            path: A file, or the folder of a distributed checkpoint.
            weights_only: Read only tensors and plain values.
            adapt: Changes the tensors of a file before they are used; those of a folder are read shard by shard.

        Raises:
            OSError: If it cannot be opened.
            ValueError: If it is damaged, no checkpoint, or holds other objects with ``weights_only``.
        """
        return _open_folder(path, weights_only) if os.path.isdir(path) else _open_file(path, weights_only, adapt)


@torch.no_grad()
def load_weights_(module: nn.Module, path: str, weights_only: bool = True) -> None:
    """Copy the weights of a checkpoint into the module, by name.

    A tensor that the checkpoint does not have, or that cannot be written in place, such as an expanded one, is left as
    it is.

    Args:
        module: The module; under FSDP2 every rank gets its shards.
        path: A file, or the folder of a distributed checkpoint, that Lightning wrote.
        weights_only: Read only tensors and plain values.

    Raises:
        OSError: If the checkpoint cannot be opened.
        ValueError: If it is damaged, no checkpoint, of another model, or holds other objects with ``weights_only``;
            for a file before anything is copied.
    """
    shards.reshard_(module)
    saved, live = SavedWeights.open(path, weights_only), module_tensors.writable_tensors(module)
    for name in (found := live.keys() & saved.shapes.keys()):
        if saved.shapes[name] != live[name].shape:
            raise ValueError(
                f"{path} is of another model: its {name} has the shape {tuple(saved.shapes[name])}, and the module's"
                f" {tuple(live[name].shape)}"
            )
    saved.copy_into_({name: live[name] for name in live if name in found})


def _open_file(
    path: str, weights_only: bool, adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None
) -> SavedWeights:
    loaded = safe_reading.load(path, weights_only, skip_objects=True)
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} is no checkpoint of Lightning: it has no `state_dict`")
    saved = {module_tensors.plain_name(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if adapt is not None:
        saved = adapt(saved)

    def copy_into_(targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            shards.copy_(target, saved[name])

    return SavedWeights({name: tensor.shape for name, tensor in saved.items()}, copy_into_)


def _open_folder(path: str, weights_only: bool) -> SavedWeights:
    try:
        entries = reader_of(path, weights_only).read_metadata().state_dict_metadata
    except Exception as error:
        raise ValueError(f"{path} is damaged ({safe_reading.first_line(error)})") from error
    saved = {key.removeprefix(_PREFIX): entry for key, entry in entries.items() if key.startswith(_PREFIX)}
    shapes = {key: entry.size for key, entry in saved.items() if hasattr(entry, "size")}
    keys = {module_tensors.plain_name(key): key for key in shapes}

    def copy_into_(targets: Mapping[str, Tensor]) -> None:
        # Into the live storage, shard by shard.
        load_folder({"state_dict": {keys[name]: target for name, target in targets.items()}}, path, weights_only)

    return SavedWeights({name: shapes[key] for name, key in keys.items()}, copy_into_)
