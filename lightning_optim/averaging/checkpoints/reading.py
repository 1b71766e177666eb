"""Read the weights of a checkpoint: of Lightning, a state dict, safetensors, or a folder of shards."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_optim.averaging.checkpoints.provenance import Provenance, read_provenance
from lightning_optim.runtime.files import safe_reading
from lightning_optim.runtime.files.sharded_reading import check_folder, load_folder, reader_of

Keys: TypeAlias = tuple[Any, ...]  # the keys that lead to a tensor in nested dictionaries

Notice: TypeAlias = Callable[[str, Mapping[Any, Any]], None]  # is told of each checkpoint that is read: path, content

ENDINGS = (".ckpt", ".pt", ".pth", ".safetensors")
STATE_DICT = "state_dict"
_OTHERS = ("model", "model_state_dict", "ema")  # keys that other training loops use
_DEPTH, _MAPPINGS = 32, 1_000_000


def load_checkpoint(
    path: str | os.PathLike[str], weights_only: bool = True, check: bool = True, skip_objects: bool = False
) -> dict[Any, Any]:
    """Load a checkpoint. Its tensors are mapped from the disk where possible, and read when they are used.

    Args:
        path: Path of a file, or of the folder of a distributed checkpoint, whose values beside the tensors are loaded.
        weights_only: If True, read only tensors and plain values.
        check: If True, check the file first (:func:`~lightning_optim.runtime.files.safe_reading.check`).
        skip_objects: As for :func:`~lightning_optim.runtime.files.safe_reading.load`.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If the file is damaged, is not a dictionary, or needs ``weights_only=False``.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        meta = os.path.join(path, "meta.pt")
        loaded = safe_reading.load(meta, weights_only, check) if os.path.exists(meta) else {}
    else:
        loaded = safe_reading.load(path, weights_only, check, skip_objects)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, and not a dictionary of names to weights")
    _refuse_endless(loaded, path)
    return loaded


def weights_in(
    path: str | os.PathLike[str],
    weights_only: bool = True,
    key: str | None = None,
    check: bool = True,
    skip_objects: bool = False,
) -> dict[Any, Any]:
    """Read the weights of a checkpoint, which :func:`weights_key` finds."""
    return weights_and_provenance(path, weights_only, key, check, skip_objects)[0]


def weights_and_provenance(
    path: str | os.PathLike[str],
    weights_only: bool = True,
    key: str | None = None,
    check: bool = True,
    skip_objects: bool = False,
    notice: Notice | None = None,
) -> tuple[dict[Any, Any], Provenance | None]:
    """Read the weights of a checkpoint, and of which other checkpoints they are the mean, if the file says so."""
    path = os.fspath(path)
    if os.path.isdir(path):
        if notice is not None:
            notice(path, load_checkpoint(path, weights_only))
        return _weights_of_folder(path, weights_only, key), None
    loaded = load_checkpoint(path, weights_only, check, skip_objects)
    if notice is not None:
        notice(path, loaded)
    weights = weights_of(loaded, path, key)
    _check_extent(path, weights)
    return weights, read_provenance(path, loaded)


def weights_of(loaded: Mapping[Any, Any], path: str, key: str | None = None) -> dict[Any, Any]:
    """Return the weights of a loaded checkpoint."""
    where = weights_key(loaded, path, key)
    return dict(loaded if where is None else loaded[where])


def weights_key(loaded: Mapping[Any, Any], path: str, key: str | None = None) -> str | None:
    """Return the key of the weights in a loaded checkpoint; ``None`` if it is a state dict itself.

    This is ``key`` if given, else ``state_dict``, else the one of ``model``, ``model_state_dict`` and ``ema`` that the
    checkpoint has.

    Raises:
        ValueError: If it has several of these, or no weights under ``key``.
    """
    if key is not None:
        if not isinstance(loaded.get(key), Mapping):
            raise ValueError(f"{path} has no weights under `{key}`; there are {_shown(loaded)}")
        return key
    if STATE_DICT in loaded:
        if not isinstance(loaded[STATE_DICT], Mapping):
            raise ValueError(
                f"{path} holds a {type(loaded[STATE_DICT]).__name__} as `{STATE_DICT}`, and no weights by name: there"
                " is nothing to average"
            )
        return STATE_DICT
    found = [name for name in _OTHERS if isinstance(loaded.get(name), Mapping) and holds_tensors(loaded[name])]
    if len(found) > 1:
        raise ValueError(f"{path} holds weights under {found}: choose with `key=`, or with `--key` in a command")
    return found[0] if found else None


def leaves(state: Mapping[Any, Any], before: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield the path of keys and the value of each leaf in nested dictionaries.

    A dictionary without tensors is one value, and so is the ``_extra_state`` of a module.
    """
    for name, value in state.items():
        path = (*before, name)
        if isinstance(value, Mapping) and not str(name).endswith("_extra_state") and holds_tensors(value):
            yield from leaves(value, path)
        else:
            yield path, value


def holds_tensors(value: Any) -> bool:
    """Return True if ``value`` is a tensor or a dictionary with a tensor on any level."""
    if isinstance(value, Mapping):
        return any(map(holds_tensors, value.values()))
    return isinstance(value, Tensor)


def _shown(loaded: Mapping[Any, Any]) -> list[str]:
    return [str(name) for name in loaded][:20]


def _refuse_endless(loaded: Mapping[Any, Any], path: str) -> None:
    """Refuse dictionaries that contain themselves, or one another so often that no walk over the keys would end."""
    waiting, seen = [(loaded, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > _DEPTH or seen > _MAPPINGS:
            raise ValueError(f"{path} holds names on more than {_DEPTH} levels, or more than {_MAPPINGS:,} mappings")
        waiting += [(one, depth + 1) for one in value.values() if isinstance(one, Mapping)]


def _check_extent(path: str, weights: Mapping[Any, Any]) -> None:
    """Refuse tensors that expand the values of the file so often that their mean would not fit into memory."""
    tensors = [value for _, value in leaves(weights) if isinstance(value, Tensor)]
    values = [value for value in tensors if value.layout is torch.strided and not value.is_nested]
    views = {(value.data_ptr(), value.shape, value.stride(), value.dtype): value.numel() for value in values}
    total = sum(count * dtype.itemsize for (*_, dtype), count in views.items())
    if total > safe_reading.largest(path):
        raise ValueError(
            f"{path} holds tensors of {total:,} bytes, many times as many as the file has: their mean"
            " would not fit into memory"
        )


def _refuse_folder_of_checkpoints(path: str) -> None:
    """Raise if a folder is no checkpoint, but has checkpoints in it, perhaps in Lightning's folder ``checkpoints``."""
    if os.path.exists(os.path.join(path, ".metadata")):
        return
    for folder in (path, os.path.join(path, "checkpoints")):
        names = os.listdir(folder) if os.path.isdir(folder) else []
        if found := [name for name in names if name.endswith(ENDINGS)]:
            (ending, count), *_ = Counter(os.path.splitext(name)[1] for name in found).most_common()
            number = f"{count} checkpoint{'' if count == 1 else 's'}"
            raise ValueError(
                f"{path} is a folder, and no distributed checkpoint: pass the {number} in it,"
                f" {os.path.join(folder, '*')}{ending}"
            )


def _weights_of_folder(path: str, weights_only: bool, key: str | None) -> dict[str, Tensor]:
    """Read the full tensors of a distributed checkpoint, without a process group."""
    _refuse_folder_of_checkpoints(path)
    metadata = reader_of(path, weights_only).read_metadata()
    check_folder(path, metadata, weights_only)
    described = {n: a for n, a in metadata.state_dict_metadata.items() if isinstance(a, TensorStorageMetadata)}
    total = sum(about.size.numel() * about.properties.dtype.itemsize for about in described.values())
    if weights_only and total > safe_reading.largest(path):
        raise ValueError(
            f"{path} holds tensors of {total:,} bytes, many times as many as its files have: pass"
            " `weights_only=False` if you trust it"
        )
    # A folder holds {"state_dict": {"w": …}} as "state_dict.w".
    levels: dict[str, dict[str, Tensor]] = {}
    for name in described:
        top, dot, rest = name.partition(".")
        if dot:
            levels.setdefault(top, {})[rest] = torch.empty(0)
    where = weights_key(levels, path, key)
    prefix = "" if where is None else f"{where}."
    found = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in described.items()
        if name.startswith(prefix)
    }
    load_folder(found, path, weights_only, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}
