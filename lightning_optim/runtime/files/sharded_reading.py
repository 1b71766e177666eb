"""Read a distributed checkpoint, a folder, without running the code that its metadata may name: it is a pickle."""

from __future__ import annotations

import io
import os
import pickle
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata

from lightning_optim.runtime.files import safe_reading

_LARGEST = 1 << 63
_METADATA = "torch.distributed.checkpoint.metadata"
_DESCRIPTIONS = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
_VALUES = {
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


class SafeReader(dcp.FileSystemReader):
    """Read a folder as torch's ``FileSystemReader`` does, but build nothing except descriptions from the metadata.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._folder = os.fspath(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the names, sizes and places of the tensors."""
        metadata = _read(os.path.join(self._folder, ".metadata"))
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = getattr(self, "load_id", None)
        return metadata


def reader_of(path: str | os.PathLike[str], weights_only: bool) -> dcp.FileSystemReader:
    """Return the reader for a folder: :class:`SafeReader`, or torch's own if the folder is trusted."""
    return SafeReader(path) if weights_only else dcp.FileSystemReader(path)


def load_folder(state: dict[str, Any], path: str, weights_only: bool, **how: Any) -> None:
    """Read tensors from a folder into those of the same names in ``state``; under FSDP2 each rank reads its shards.

    Raises:
        ValueError: If the folder is damaged, of another model, or names code. Tensors that were read before the error
            keep their new values.
    """
    try:
        dcp.load(state, storage_reader=reader_of(path, weights_only), **how)
    except (Exception, dcp.CheckpointException) as error:
        raise ValueError(f"{path} is damaged, or of another model ({safe_reading.first_line(error)})") from error


def check_folder(path: str, metadata: Metadata, weights_only: bool) -> None:
    """Check the sizes and checksums of the files in the folder, as :func:`~.safe_reading.check` does.

    Raises:
        ValueError: If a file is damaged, missing or outside of the folder.
    """
    _check_descriptions(os.path.join(path, ".metadata"), metadata)
    inside = os.path.realpath(path)
    for info in metadata.storage_data.values():
        file = os.path.join(inside, info.relative_path)
        if os.path.commonpath([inside, os.path.realpath(file)]) != inside:
            raise ValueError(f"{path} names a file outside of it: {info.relative_path!r}")
        try:
            with open(file, "rb") as shards:
                is_whole = info.offset + info.length <= shards.seek(0, io.SEEK_END)
                shards.seek(info.offset)
                content = shards.read(info.length) if is_whole else b""
        except OSError as error:
            raise ValueError(f"{path} is damaged ({safe_reading.first_line(error)})") from error
        if not is_whole:
            raise ValueError(f"{path} is damaged: {info.relative_path!r} is shorter than it was")
        safe_reading.check_archive(file, io.BytesIO(content), weights_only)


def _check_descriptions(path: str, metadata: Metadata) -> None:
    """Check that the parts in the metadata make up each tensor: for missing parts torch would return random memory.

    Args:
        path: The file of the metadata, for the error.
        metadata: The metadata.

    Raises:
        ValueError: If they do not.
    """
    try:
        for name, about in metadata.state_dict_metadata.items():
            if not isinstance(name, str):
                raise TypeError(f"{name!r} is no name")
            if not isinstance(about, BytesStorageMetadata):
                _check_parts(name, about)
        for info in metadata.storage_data.values():
            if "\0" in info.relative_path or not 0 <= info.offset <= info.offset + info.length < _LARGEST:
                raise ValueError(f"{info} is no place in a file")
    except Exception as error:  # each entry may be anything, and raise anything
        raise ValueError(f"{path} is damaged, or hostile ({safe_reading.first_line(error)})") from error


def _check_parts(name: str, about: TensorStorageMetadata) -> None:
    numbers = 0
    for offsets, sizes in {(part.offsets, part.sizes) for part in about.chunks}:  # replicated ones may be there twice
        limits = zip(offsets, sizes, about.size, strict=True)
        if not all(offset >= 0 and size >= 0 and offset + size <= whole for offset, size, whole in limits):
            raise ValueError(f"a part of {name} lies outside of it")
        numbers += sizes.numel()
    if numbers != about.size.numel() or not isinstance(about.properties.dtype, torch.dtype):
        raise ValueError(f"the parts of {name} do not make it up")


def _read(path: str) -> Metadata:
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f"{os.path.dirname(path)} is a folder, and no distributed checkpoint") from None
    except Exception as error:
        raise ValueError(f"{path} is damaged, or hostile ({safe_reading.first_line(error)})") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} is no metadata of a checkpoint, but a {type(metadata).__name__}")
    _check_descriptions(path, metadata)
    return metadata


class _Unpickler(pickle._Unpickler):
    """Unpickle in Python: the unpickler in C allocates memory for the largest index that a file names."""

    dispatch: ClassVar[dict[int, Any]] = {
        opcode: load for opcode, load in pickle._Unpickler.dispatch.items() if opcode != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _DESCRIPTIONS | _VALUES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set the attributes of a description, and never of a class or a function."""
        kind = type(self.stack[-2])  # type: ignore[attr-defined]
        if (kind.__module__, kind.__name__) not in _DESCRIPTIONS:
            raise pickle.UnpicklingError(f"it changes a {kind.__name__}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build
