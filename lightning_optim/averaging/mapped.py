"""Where the tensors of a file lie, so that many files are averaged at the speed at which they are read.

``torch.load`` rebuilds one tensor after the other in an interpreter of pickles that is written in Python: that takes
longer than to read the tensors. Here the pickle is read by the interpreter in C, and instead of tensors it makes
descriptions of where they lie. It calls nothing that the file names: what is not a plain value or a tensor ends it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_optim.averaging.reading import is_safetensors, weights_of

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class Place(NamedTuple):
    """Where a contiguous tensor begins in its file, in bytes, and what it is."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def size(self) -> int:
        """In bytes."""
        return self.shape.numel() * self.dtype.itemsize

    def is_within(self, length: int) -> bool:
        """Whether a file of that length holds it, where its elements can be mapped."""
        return 0 <= self.offset <= length - self.size and self.offset % self.dtype.itemsize == 0

    @property
    def has_mean(self) -> bool:
        """Whether there are numbers in it that can be averaged."""
        return self.size > 0 and (self.dtype.is_floating_point or self.dtype.is_complex)


class MappedFile(NamedTuple):
    """A file's bytes, mapped from the disk, and the place of each tensor in it."""

    raw: Tensor
    places: dict[str, Place]

    def elements(self, offset: int, dtype: torch.dtype, count: int) -> Tensor:
        """So many elements from a byte on."""
        return self.raw[offset : offset + count * dtype.itemsize].view(dtype)

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name."""
        place = self.places[name]
        return self.elements(place.offset, place.dtype, place.shape.numel()).view(place.shape)


def open_mapped(path: str) -> MappedFile | None:
    """The weights of a checkpoint, a plain state dict or a safetensors file; ``None`` if it is not as simple as that.

    A file is not if it is remote, a folder, or none of torch's archives, if there is more in it than plain values and
    tensors, or if a tensor among the weights is not contiguous or is no multiple of its elements from the start.
    """
    if not os.path.isfile(path):
        return None
    try:
        places = _in_safetensors(path) if is_safetensors(path) else _in_archive(path)
    except Exception:  # of any kind: whoever loads the file in the ordinary way finds out what is wrong
        return None
    length = os.path.getsize(path)
    if not all(place.is_within(length) for place in places.values()):
        return None
    return MappedFile(torch.from_file(path, shared=False, size=length, dtype=torch.uint8), places)


def runs(files: Sequence[MappedFile], names: Sequence[str], limit: int) -> Iterator[list[str]]:
    """Names whose tensors follow one another in all files at the same distances: one stretch of elements to read.

    Args:
        files: Files with tensors of the same dtypes and shapes.
        names: Which of their tensors.
        limit: The largest stretch in bytes, unless one tensor is larger.
    """
    places = files[0].places
    run: list[str] = []
    for name in sorted(names, key=lambda name: places[name].offset):
        if run and not _continues(files, run[0], name, limit):
            yield run
            run = []
        run.append(name)
    if run:
        yield run


def _continues(files: Sequence[MappedFile], first: str, name: str, limit: int) -> bool:
    one, other = files[0].places[first], files[0].places[name]
    distance = other.offset - one.offset
    return (
        one.dtype == other.dtype
        and distance + other.size <= limit
        and all(file.places[name].offset - file.places[first].offset == distance for file in files)
    )


# ---- safetensors -----------------------------------------------------------------------------------------------------


def _in_safetensors(path: str) -> dict[str, Place]:
    """The header: its length in 8 bytes, then a JSON object of dtype, shape and the ends of each tensor."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Place(8 + length + about["data_offsets"][0], _SAFETENSORS[about["dtype"]], torch.Size(about["shape"]))
        for name, about in header.items()
    }


# ---- torch's archives ------------------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """A tensor in a pickle: the record that holds its storage, and which elements of it."""

    record: str
    dtype: torch.dtype
    start: int
    shape: torch.Size


def _in_archive(path: str) -> dict[str, Place]:
    reader: Any = torch._C.PyTorchFileReader(path)
    if reader.has_record("byteorder") and reader.get_record("byteorder").decode() != sys.byteorder:
        raise ValueError("the bytes are in another order")
    loaded = _Unpickler(io.BytesIO(reader.get_record("data.pkl"))).load()
    weights = weights_of(loaded)
    if not all(isinstance(value, _Stored) for value in weights.values()):
        raise ValueError("something among the weights is no contiguous tensor")
    return {
        name: Place(reader.get_record_offset(record) + start * dtype.itemsize, dtype, shape)
        for name, (record, dtype, start, shape) in weights.items()
    }


def _stored(
    storage: tuple[str, torch.dtype], start: int, size: Sequence[int], stride: Sequence[int], *more: Any
) -> _Stored | None:
    """What stands in for ``torch._utils._rebuild_tensor_v2``."""
    if any(more[2:]) or not _dense(size, stride):
        return None
    return _Stored(*storage, start, torch.Size(size))


def _dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for length, step in zip(reversed(size), reversed(stride), strict=True):
        if step != expected:
            return False
        expected *= max(length, 1)
    return True


def _data_of(stored: _Stored | None, *_: Any) -> _Stored | None:
    """What stands in for ``torch._utils._rebuild_parameter``."""
    return stored


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _stored,
    ("torch._utils", "_rebuild_parameter"): _data_of,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is no plain value")
        return _KNOWN[module, name]

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> tuple[str, torch.dtype]:
        _, dtype, key, _, _ = pid
        return f"data/{key}", dtype
