"""Read the weights in files: Lightning's checkpoints, plain state dicts, safetensors, folders of shards."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_STATE = "state_dict"
_FOLDER = f"{_STATE}."  # what Lightning puts before each name in a distributed checkpoint


def load_checkpoint(path: str | os.PathLike[str], weights_only: bool = True) -> dict[str, Any]:
    """All that a file holds, its tensors mapped from the disk where that is possible: they are read when used.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file holds more than tensors and plain values, and ``weights_only`` is set; or if it is
            broken, or none of these.
    """
    path = os.fspath(path)
    if is_safetensors(path):
        return dict(safetensors(path))
    if os.path.isdir(path):
        return _metadata_of_folder(path)
    loaded = _load_file(path, weights_only)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, and no names with weights")
    return loaded


def _load_file(path: str, weights_only: bool) -> Any:
    try:
        if os.path.exists(path):
            return _load_local(path, weights_only)
        with get_filesystem(path).open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, and loading that can run any code: pass"
            f" `weights_only=False` if you trust it. ({error})"
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError) as error:  # what torch and pickle say of other bytes
        raise ValueError(f"{path} is no checkpoint, or only a part of one ({type(error).__name__}: {error})") from error


def _load_local(path: str, weights_only: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except RuntimeError:  # a file from before torch 1.6 is no archive that could be mapped
        return torch.load(path, map_location="cpu", weights_only=weights_only)


def weights_in(path: str | os.PathLike[str], weights_only: bool = True) -> dict[str, Any]:
    """The ``state_dict`` of a file, and of a plain one all of it."""
    path = os.fspath(path)
    if os.path.isdir(path):
        return _weights_of_folder(path)
    return weights_of(load_checkpoint(path, weights_only))


def weights_of(loaded: Mapping[str, Any]) -> Any:
    """What of a loaded file is its weights."""
    return loaded[_STATE] if isinstance(loaded.get(_STATE), Mapping) else loaded


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether the name says so."""
    return os.fspath(path).endswith(".safetensors")


def safetensors(path: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, mapped from the disk, of a safetensors file."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ModuleNotFoundError(f"{os.fspath(path)} needs `pip install safetensors`") from error
    file: Any = safe_open(os.fspath(path), framework="pt")
    for name in file.keys():  # noqa: SIM118 (it is no dictionary)
        yield name, file.get_tensor(name)


def _metadata_of_folder(path: str) -> dict[str, Any]:
    """What Lightning writes beside the shards: epochs, callbacks, hyper-parameters."""
    meta = os.path.join(path, "meta.pt")
    return torch.load(meta, map_location="cpu", weights_only=True) if os.path.exists(meta) else {}


def _weights_of_folder(path: str) -> dict[str, Tensor]:
    """The whole tensors of a distributed checkpoint, read without process groups."""
    described = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in described.items()
        if name.startswith(_FOLDER) and isinstance(about, TensorStorageMetadata)
    }
    dcp.load(found, checkpoint_id=path, no_dist=True)
    return {name.removeprefix(_FOLDER): tensor for name, tensor in found.items()}
