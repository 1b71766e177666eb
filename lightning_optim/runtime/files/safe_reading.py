"""Read files of tensors, with an error that names the file if it is damaged, hostile or of another format.

Before a file is loaded, three checks are made: ``torch.save`` writes its format, its records fit into it, and their
checksums are right. The archives of ``torch.save`` are zip files and have checksums, which ``torch.load`` does not
read. Its format before torch 1.6 and safetensors have none, so that changed values in them go unnoticed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import torch
from torch import Tensor, nn

from lightning_optim.runtime.files.filesystems import filesystem_of

_ZIP = b"PK\x03\x04"
_OLD = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the first number in a file from before torch 1.6
_PIECE = 1 << 20
_FOLDER = 0x10  # bit of a record's attributes by which DOS marks a folder
_EXPANSION = 16  # weights of few digits are compressed to a third, those of a pruned model to a tenth
_SMALL = 4 << 20
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, pickle.UnpicklingError)


def load(
    path: str | os.PathLike[str], weights_only: bool = True, check: bool = True, skip_objects: bool = False
) -> Any:
    """Load a file on the CPU; tensors that are not compressed are mapped from the disk.

    Args:
        path: A file that ``torch.save`` or safetensors wrote, on a local or a remote file system.
        weights_only: Read nothing but tensors and plain values: other objects can run any code.
        check: True to :func:`check` it first.
        skip_objects: With ``weights_only``, read an empty object in place of each other one, such as a package's
            hyper-parameters beside the weights. Nothing that the file names is called.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is damaged, of another format, or holds other objects and ``weights_only`` is True; with
            ``skip_objects`` only those of modules that torch blocks, such as ``os``, or that cannot be left out.
    """
    path = os.fspath(path)
    with _opened(path) as file:
        if check:
            _check(path, file, weights_only)
        is_local = os.path.exists(path)
        with _named_errors(path, weights_only):
            if is_safetensors(path):
                return _load_safetensors(path if is_local else file)
            records = _records(file)
        with _named_errors(path, weights_only, is_whole=bool(records)):
            mmap = is_local and bool(records) and _are_stored(records)
            file.seek(0)
            skipped = _skipped_objects(file) if weights_only and skip_objects and records else ()
            with torch.serialization.safe_globals(list(skipped)):
                source = path if is_local else file
                loaded = torch.load(source, map_location="cpu", weights_only=weights_only, mmap=mmap)
            if weights_only and records:
                _check_storages(loaded, records)
            return loaded


class _Skipped(dict):
    """Stand for a class or function that a file names: its objects ignore what the file sets in them."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # an enumeration may be a key

    def __new__(cls, *args: Any, **kwargs: Any) -> _Skipped:
        return dict.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignore the state of the object that was saved."""


class _SkippedDictionary:
    """Stand for a subclass of ``dict``: torch's reader sets items in dictionaries of its own types alone."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _skipped_objects(file: IO[bytes]) -> Iterator[tuple[type, str]]:
    """Yield a stand-in for each name in an archive that torch does not load with ``weights_only``."""
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(file):
        kind = _SkippedDictionary if name.lower().endswith("dict") else _Skipped
        yield type(name, (kind,), {}), name
    file.seek(0)


def check(path: str | os.PathLike[str], weights_only: bool = True) -> None:
    """Check a file without loading it.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is no checkpoint, damaged, or would take far more memory than its size on the disk.
    """
    path = os.fspath(path)
    with _opened(path) as file:
        _check(path, file, weights_only)


def check_archive(path: str, file: IO[bytes], weights_only: bool) -> None:
    """Check a file object if it is an archive; ``path`` names it in the ValueError if it is damaged."""
    if file.read(len(_ZIP)) == _ZIP:
        _check_archive(path, file, weights_only)


def largest(path: str | os.PathLike[str]) -> int:
    """Return the largest number of bytes that the tensors of a file or folder may take in memory.

    Real ones take less, a decompression bomb more.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        size = sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
    else:
        size = os.path.getsize(path) if os.path.exists(path) else filesystem_of(path).size(path)
    return max(_EXPANSION * size, _SMALL)


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Return True if the name ends in ``.safetensors``."""
    return os.fspath(path).endswith(".safetensors")


def first_line(error: BaseException) -> str:
    """Shorten an error to one line: torch adds a page of advice."""
    text = str(error)
    lines = (text.partition("WeightsUnpickler error: ")[2] or text).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    if os.path.isfile(path) or os.path.isdir(path):
        with open(path, "rb") as file:  # the error for a folder says that it is one
            yield file
    elif os.path.exists(path):
        raise OSError(errno.EINVAL, "this is no regular file, and a checkpoint is read more than once", path)
    else:
        try:
            remote = filesystem_of(path).open(path, "rb")
        except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
            kind = ImportError if isinstance(error, ImportError) else ValueError
            raise kind(f"{path}: {error}") from error
        with remote:
            whole = io.BytesIO(remote.read())  # it is read twice, but transferred over a network once
        yield whole


@contextlib.contextmanager
def _named_errors(path: str, weights_only: bool, is_whole: bool = False) -> Iterator[None]:
    """Context manager: name the file in errors that torch, pickle, zipfile and safetensors raise for unexpected bytes.

    Some operands of pickles are not read with ``weights_only``. In a file without checksums an unknown operand is more
    likely a damage.
    """
    try:
        yield
    except ImportError as error:
        raise ModuleNotFoundError(f"{path}: {error}") from error
    except Exception as error:
        is_foreign = isinstance(error, pickle.UnpicklingError) and (is_whole or "operand" not in str(error))
        if weights_only and is_foreign:
            raise _more_than_tensors(path, first_line(error)) from error
        raise ValueError(f"{path} is damaged or incomplete, or no checkpoint{_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the end of a message about a damaged file; without what its format calls the damage."""
    is_damage = isinstance(error, _DAMAGE) or type(error).__name__ == "SafetensorError"
    return ": copy it again, or take another one" if is_damage else f" ({first_line(error)})"


def _more_than_tensors(path: str, reason: str) -> ValueError:
    return ValueError(
        f"{path} holds more than tensors and plain values, and loading that can run any code: pass"
        f" `weights_only=False` if you trust it, or `--unsafe` to a command ({reason})"
    )


# ---- checks before loading -------------------------------------------------------------------------------------------


def _check(path: str, file: IO[bytes], weights_only: bool) -> None:
    if is_safetensors(path):
        return  # its reader compares the sizes itself
    head = file.read(512)
    file.seek(0)
    if head.startswith(_ZIP):
        _check_archive(path, file, weights_only)
    elif _OLD in head[:32]:
        if weights_only and _mentions_bytearray(file):
            raise _more_than_tensors(path, "a bytearray")
    elif head[257:262] != b"ustar":  # torch's first format, which it reads with `weights_only=False` only
        raise ValueError(f"{path} is no checkpoint: " + ("it is empty" if not head else "torch did not write it"))


def _check_archive(path: str, file: IO[bytes], weights_only: bool) -> None:
    """Check the sizes first, so that checking the records reads no more than the file."""
    with _named_errors(path, weights_only):
        archive = zipfile.ZipFile(file)
    records = sorted(archive.infolist(), key=lambda record: record.header_offset)
    _check_sizes(path, records, file.seek(0, io.SEEK_END), weights_only)
    if not any(record.CRC for record in records) and _are_stored(records):
        # Saved after `torch.serialization.set_crc32_options(False)`.
        file.seek(0)
        if weights_only and _mentions_bytearray(file):
            raise _more_than_tensors(path, "a bytearray")
        return
    for record in records:
        _check_record(path, archive, record)
        if weights_only and record.filename.endswith("data.pkl") and _mentions_bytearray(archive.open(record)):
            raise _more_than_tensors(path, "a bytearray")


def _check_sizes(path: str, records: Sequence[zipfile.ZipInfo], size: int, weights_only: bool) -> None:
    following = [record.header_offset for record in records[1:]] + [size]
    for record, end in zip(records, following, strict=True):
        is_stored = record.compress_type == zipfile.ZIP_STORED
        if not is_stored and record.compress_type != zipfile.ZIP_DEFLATED:
            raise ValueError(f"{path} is compressed in a way that torch does not read (its record {record.filename!r})")
        # torch reads no bytes of a record that is marked as a folder, and returns uninitialized memory as its values.
        if record.file_size and (record.is_dir() or record.external_attr & _FOLDER):
            raise ValueError(f"{path} is damaged: its record {record.filename!r} is marked as a folder")
        is_larger = is_stored and record.file_size != record.compress_size
        if is_larger or record.header_offset + record.compress_size > end:
            raise ValueError(f"{path} is damaged: its record {record.filename!r} does not fit into it")
    declared = sum(record.file_size for record in records)
    if weights_only and declared > max(_EXPANSION * size, _SMALL):
        raise ValueError(
            f"{path} would be {declared / size:.0f} times as large if it were not compressed, which no weights are:"
            " it is not loaded, unless `weights_only=False` says that you trust it (`--unsafe` to a command)"
        )


def _check_record(path: str, archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    try:
        with archive.open(record) as content:
            while content.read(_PIECE):
                pass
    except Exception as error:  # zipfile and zlib raise errors of their own
        raise ValueError(f"{path} is damaged in its record {record.filename!r}{_reason(error)}") from error


def _mentions_bytearray(file: IO[bytes]) -> bool:
    """Return True if a pickle makes a ``bytearray``: torch allows it, and a number in the file sets its length."""
    wanted, before = b"\nbytearray\n", b""
    while piece := file.read(_PIECE):
        if wanted in before + piece:
            return True
        before = (before + piece)[1 - len(wanted) :]
    return False


def _records(file: IO[bytes]) -> list[zipfile.ZipInfo]:
    """List the records of an archive; an empty list for another file."""
    file.seek(0)
    is_archive = file.read(len(_ZIP)) == _ZIP
    return zipfile.ZipFile(file).infolist() if is_archive else []


def _are_stored(records: Iterable[zipfile.ZipInfo]) -> bool:
    """Return True if no record is compressed, so that all can be mapped."""
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _check_storages(loaded: Any, records: Iterable[zipfile.ZipInfo]) -> None:
    """Raise if a tensor has not the size of a record: a pickle may claim any, and a mapped file has more bytes."""
    sizes = Counter(record.file_size for record in records if "/data/" in record.filename)
    storages = {}
    for tensor in _tensors(loaded):
        if tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_nested:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    if wrong := Counter(storages.values()) - sizes - Counter({0: len(storages)}):
        raise ValueError(f"no record is of the {next(iter(wrong))} bytes of a tensor")


def _tensors(loaded: Any) -> Iterator[Tensor]:
    """Yield each tensor in nested dictionaries, lists and tuples once."""
    waiting, seen = [loaded], {id(loaded)}
    while waiting:
        value = waiting.pop()
        if type(value) in (Tensor, nn.Parameter):
            yield value
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        new = [one for one in inside if id(one) not in seen]
        seen.update(map(id, new))
        waiting += new


# ---- safetensors -----------------------------------------------------------------------------------------------------


def _load_safetensors(source: str | IO[bytes]) -> dict[str, Tensor]:
    """Load the tensors; those of a local file are mapped from the disk."""
    try:
        from safetensors.torch import load, load_file
    except ImportError as error:
        raise ModuleNotFoundError("a .safetensors file needs `pip install safetensors`") from error
    return load_file(source) if isinstance(source, str) else load(source.read())
