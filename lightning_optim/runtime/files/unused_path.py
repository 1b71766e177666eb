"""Find a path for a new checkpoint that overwrites none."""

from __future__ import annotations

import os

from lightning_optim.runtime.files.filesystems import filesystem_of


def unused_path(directory: str | os.PathLike[str], stem: str) -> str:
    """Return ``stem.ckpt`` in a folder, or the first of ``stem-v1.ckpt``, ``stem-v2.ckpt``, … that is not there.

    A path is taken too while a checkpoint is being written beside it, with ``.new`` at its end.

    Example::

        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> (folder / "best.ckpt").touch(), (folder / "best-v1.ckpt.new").touch()
        (None, None)
        >>> os.path.basename(unused_path(folder, "best"))
        'best-v2.ckpt'
    """
    path, version = os.path.join(directory, f"{stem}.ckpt"), 0
    filesystem = filesystem_of(path)
    while any(filesystem.exists(name) for name in (path, f"{path}.new")):
        version += 1
        path = os.path.join(directory, f"{stem}-v{version}.ckpt")
    return path
