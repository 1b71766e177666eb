"""Check tensors that a user gives by the names of parameters, and read them from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_optim.base.construction import written
from lightning_optim.base.module_tensors import plain_name

NamedTensors: TypeAlias = Mapping[str, Tensor]


def check_named_tensors(name: str, value: Any, *, path: bool = False) -> Any:
    """Check an argument that gives tensors by the names of parameters, and return it.

    Args:
        name: The argument's name, for the message.
        value: The argument. ``None`` is allowed.
        path: Also allow the path of a file.

    Raises:
        ValueError: If it is none of these.
    """
    if value is None or (path and isinstance(value, str | os.PathLike)):
        return value
    items = list(value.items()) if isinstance(value, Mapping) else []
    if not items or not all(isinstance(key, str) and isinstance(one, Tensor) for key, one in items):
        raise ValueError(
            f"`{name}` must be a dictionary of parameter name to tensor{', the path of a checkpoint' if path else ''}"
            f" or None, got {written(value)}"
        )
    return value


def tensors_by_name(name: str, value: NamedTensors | str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of an argument by their plain names; those of a checkpoint on the CPU.

    Args:
        name: The argument's name, for the message.
        value: A dictionary of name to tensor, or the path of a Lightning checkpoint or of a file with a ``state_dict``.

    Raises:
        ValueError: If the file cannot be read as one of these; the message names a way out.
    """
    found: Any = value if isinstance(value, Mapping) else _read(name, Path(value))
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise ValueError(f"`{name}={str(value)!r}` holds a {type(found).__name__}, and no dictionary of tensors")
    return {plain_name(key): one for key, one in found.items() if isinstance(key, str) and isinstance(one, Tensor)}


def _read(name: str, path: Path) -> Any:
    """Read a file without running code that it names."""
    instead = f"pass the dictionary of parameter name to tensor itself, as `{name}=…`"
    if not path.is_file():
        what = "a folder, such as FSDP2 writes" if path.is_dir() else "no file"
        raise ValueError(f"`{name}={str(path)!r}` is {what}: pass the path of a single-file checkpoint, or {instead}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint fails at any point of reading, in many ways
        raise ValueError(
            f"`{name}={str(path)!r}` cannot be read as tensors and plain values, by {_reason(error)}: {instead}."
        ) from error


def _reason(error: Exception) -> str:
    """Return the kind of an error and the first sentence of its text, in which torch's advice would mislead."""
    first = (str(error).splitlines() or [""])[0].split(". ")[0].strip(" .")
    return f"{type(error).__name__} ({first})" if first else type(error).__name__
