"""Write a file completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[str]:
    """Context manager: give a path to write to, and move the written file to ``path`` when the block ends well.

    If the block raises (a full disk, an interrupt), ``path`` holds what it held before, and no other file is left. On
    Linux the same is true after a kill at any moment: the file gets a name when it is complete and on the disk. To
    replace an existing file it needs another name for the time between two system calls. On file systems without
    unnamed files, such as NFS, and on other systems the file has a hidden name ``.lightning-optim-…`` while it is
    written, which stays after a kill.

    If ``path`` is a link, the file that it leads to is replaced. The mode of a replaced file is kept.

    Args:
        path: A file of the local disk, in a folder that exists.

    Raises:
        OSError: If ``path`` is a folder or a device, its folder is missing, or the disk is full.

    Example::

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with write_atomically(f"{folder}/members.json") as beside:
        ...     with open(beside, "w") as file:
        ...         _ = file.write("[]")
        >>> os.listdir(folder)
        ['members.json']
    """
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, "a file cannot replace a folder", os.fspath(path))
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(errno.EINVAL, "this is no regular file", os.fspath(path))
    folder = os.path.dirname(target)
    hidden = os.path.join(folder, f".lightning-optim-{secrets.token_hex(8)}")
    with _naming(path, folder, hidden):
        descriptor = _open_unnamed(folder)
        is_unnamed = descriptor is not None
        if descriptor is None:
            descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    beside = _path_of(descriptor) if is_unnamed else hidden
    try:
        with _naming(path, beside, hidden):
            yield beside
            os.fsync(descriptor)
            if os.path.exists(target):
                with contextlib.suppress(OSError):  # another user's file, perhaps
                    os.chmod(beside, stat.S_IMODE(os.stat(target).st_mode))
            if is_unnamed:
                _name(descriptor, hidden, target)
            else:
                os.replace(hidden, target)
        _sync_folder(folder)
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(hidden)


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str], *temporary: str) -> Iterator[None]:
    """Context manager: name ``path`` in errors, where torch's writer names no file or a ``temporary`` one is named."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__context__
        if reason is None or reason.filename not in (None, *temporary):
            raise
        raise OSError(reason.errno, reason.strerror, os.fspath(path)) from error


def _open_unnamed(folder: str) -> int | None:
    """Open a new file without a name, which is gone when the process ends; return ``None`` if that is impossible."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return None
        raise


def _path_of(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _name(descriptor: int, hidden: str, target: str) -> None:
    """Give the unnamed file its name, in one call if no file has that name yet."""
    with contextlib.suppress(OSError):
        _link(descriptor, target)
        return
    try:
        _link(descriptor, hidden)  # a link never replaces a file, a rename does
    except OSError:  # a file system that cannot link an unnamed file
        with open(_path_of(descriptor), "rb") as written, open(hidden, "xb") as copy:
            shutil.copyfileobj(written, copy)
            copy.flush()
            os.fsync(copy.fileno())
        shutil.copymode(_path_of(descriptor), hidden)
    os.replace(hidden, target)


def _link(descriptor: int, path: str) -> None:
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:  # with `dst_dir_fd` Python calls `linkat`, which follows the link in /proc; `link` does not
        os.link(_path_of(descriptor), os.path.basename(path), dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _sync_folder(folder: str) -> None:
    """Write the folder's new entry to the disk too, where a folder can be synchronized."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
