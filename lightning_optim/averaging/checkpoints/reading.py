"""Find the weights in files: Lightning's checkpoints, state dicts, safetensors, folders of shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_optim.runtime.files import safe_reading
from lightning_optim.runtime.files.sharded_reading import check_folder, load_folder, reader_of

Path: TypeAlias = tuple[Any, ...]  # the names on the way to a tensor; one for each level

STATE_DICT = "state_dict"
_OTHERS = ("model", "model_state_dict", "ema")  # where other training loops put their weights
_DEPTH, _MAPPINGS = 32, 1_000_000


def load_checkpoint(path: str | os.PathLike[str], weights_only: bool = True, check: bool = True) -> dict[Any, Any]:
    """Load all that a file holds; its tensors are mapped from the disk where that is possible, and read when used.

    Args:
        path: A file, or the folder of a distributed checkpoint, of which this is what lies beside the tensors.
        weights_only: Read nothing but tensors and plain values.
        check: Whether to check the file first, as :func:`~lightning_optim.runtime.files.safe_reading.check` does.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is damaged or of another kind, or holds more and ``weights_only`` is set.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        meta = os.path.join(path, "meta.pt")
        loaded = safe_reading.load(meta, weights_only, check) if os.path.exists(meta) else {}
    else:
        loaded = safe_reading.load(path, weights_only, check)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, and no names with weights")
    _refuse_endless(loaded, path)
    return loaded


def weights_in(
    path: str | os.PathLike[str], weights_only: bool = True, key: str | None = None, check: bool = True
) -> dict[Any, Any]:
    """Read the weights of a file: see :func:`weights_key` for where they lie."""
    path = os.fspath(path)
    if os.path.isdir(path):
        return _weights_of_folder(path, weights_only, key)
    weights = weights_of(load_checkpoint(path, weights_only, check), path, key)
    _check_extent(path, weights)
    return weights


def weights_of(loaded: Mapping[Any, Any], path: str, key: str | None = None) -> dict[Any, Any]:
    """Return the weights of a loaded file."""
    where = weights_key(loaded, path, key)
    return dict(loaded if where is None else loaded[where])


def weights_key(loaded: Mapping[Any, Any], path: str, key: str | None = None) -> str | None:
    """Return the name under which a loaded file holds its weights; ``None`` if the file is a state dict.

    That is ``key`` if given, else ``state_dict``, else the one of ``model``, ``model_state_dict`` and ``ema`` that
    there is. Of several of these none is guessed.

    Raises:
        ValueError: If there are several, or nothing of that name.
    """
    if key is not None:
        if not isinstance(loaded.get(key), Mapping):
            raise ValueError(f"{path} has no weights under `{key}`; there are {_shown(loaded)}")
        return key
    if STATE_DICT in loaded:
        if not isinstance(loaded[STATE_DICT], Mapping):
            raise ValueError(
                f"{path} holds a {type(loaded[STATE_DICT]).__name__} as `{STATE_DICT}`: nothing to average"
            )
        return STATE_DICT
    found = [name for name in _OTHERS if isinstance(loaded.get(name), Mapping) and holds_tensors(loaded[name])]
    if len(found) > 1:
        raise ValueError(f"{path} holds weights under {found}: say which with `key=`, or `--key` to a command")
    return found[0] if found else None


def leaves(state: Mapping[Any, Any], before: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the names on the way to each tensor or other value. A mapping without tensors is one value.

    So is the ``_extra_state`` of a module, which is its own affair.
    """
    for name, value in state.items():
        path = (*before, name)
        if isinstance(value, Mapping) and not str(name).endswith("_extra_state") and holds_tensors(value):
            yield from leaves(value, path)
        else:
            yield path, value


def holds_tensors(value: Any) -> bool:
    """Return whether there is a tensor under some name, on any level."""
    if isinstance(value, Mapping):
        return any(map(holds_tensors, value.values()))
    return isinstance(value, Tensor)


def _shown(loaded: Mapping[Any, Any]) -> list[str]:
    return [str(name) for name in loaded][:20]


def _refuse_endless(loaded: Mapping[Any, Any], path: str) -> None:
    """Refuse mappings that hold themselves, or one another so often that no walk over the names would end."""
    waiting, seen = [(loaded, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > _DEPTH or seen > _MAPPINGS:
            raise ValueError(f"{path} holds names on more than {_DEPTH} levels, or more than {_MAPPINGS:,} mappings")
        waiting += [(one, depth + 1) for one in value.values() if isinstance(one, Mapping)]


def _check_extent(path: str, weights: Mapping[Any, Any]) -> None:
    """Refuse tensors that repeat what is in the file so often that their mean would not fit into memory."""
    tensors = [value for _, value in leaves(weights) if isinstance(value, Tensor)]
    values = [value for value in tensors if value.layout is torch.strided and not value.is_nested]
    views = {(value.data_ptr(), value.shape, value.stride(), value.dtype): value.numel() for value in values}
    total = sum(count * dtype.itemsize for (*_, dtype), count in views.items())
    if total > safe_reading.largest(path):
        raise ValueError(f"{path} holds tensors of {total:,} bytes, many times as many as the file has")


def _weights_of_folder(path: str, weights_only: bool, key: str | None) -> dict[str, Tensor]:
    """Read the whole tensors of a distributed checkpoint, without process groups."""
    metadata = reader_of(path, weights_only).read_metadata()
    check_folder(path, metadata, weights_only)
    described = {n: a for n, a in metadata.state_dict_metadata.items() if isinstance(a, TensorStorageMetadata)}
    total = sum(about.size.numel() * about.properties.dtype.itemsize for about in described.values())
    if weights_only and total > safe_reading.largest(path):
        raise ValueError(f"{path} holds tensors of {total:,} bytes, many times as many as its files have")
    # Of {"state_dict": {"w": …}} a folder holds "state_dict.w".
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
