"""Write a safetensors file, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.averaging.checkpoints.provenance import KEY
from lightning_optim.averaging.checkpoints.reading import leaves
from lightning_optim.runtime.files.atomic_writing import write_atomically


def save_safetensors(weights: Mapping[Any, Any], path: str | os.PathLike[str], provenance: Any = None) -> None:
    """Write the tensors in ``weights`` to a file; the keys of nested dictionaries are joined with dots.

    The functions of safetensors hold a second copy of all tensors, or write a temporary file that stays behind after a
    kill. The format is the length of the header in 8 bytes, the header as a JSON object, and all tensors in sequence.

    Args:
        weights: Tensors in a dictionary, or in dictionaries within it.
        path: The file to write.
        provenance: Plain values about the origin of the weights, for the metadata of the file.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
        ValueError: If a key is not a string, two tensors have the same name, or the format does not have a dtype.
        OSError: If the file cannot be written.
    """
    path = os.fspath(path)
    named: dict[str, Tensor] = {}
    for names, value in leaves(weights):
        if isinstance(value, Tensor):
            name = ".".join(map(str, names))
            if name in named or not all(isinstance(one, str) for one in names):
                raise ValueError(
                    f"{path} cannot be written: names in safetensors are text and all different, got {names}"
                )
            named[name] = value
    # Large elements first, so that all are aligned.
    order = sorted(named, key=lambda name: (-named[name].itemsize, name))
    about = {} if provenance is None else {KEY: json.dumps(provenance)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **about}}
    end = 0
    for name in order:
        tensor, start = named[name], end
        end += tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _dtype_name(tensor.dtype, path),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with write_atomically(path) as beside, open(beside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes_of(named[name]))


def _dtype_name(dtype: torch.dtype, path: str) -> str:
    """Return the name of a dtype in safetensors, from an empty tensor that it writes."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ModuleNotFoundError(f"{path} needs `pip install safetensors`") from error
    try:
        written = save({"empty": torch.empty(0, dtype=dtype)})
    except Exception as error:  # its class depends on the version
        raise ValueError(f"{path} cannot be written: safetensors has no {dtype}; write a .ckpt file") from error
    return str(json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])["empty"]["dtype"])


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
