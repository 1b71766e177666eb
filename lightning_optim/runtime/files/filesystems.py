"""Find the file system of a path, which may be remote, as Lightning does."""

from __future__ import annotations

import os

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs


def filesystem_of(path: str | os.PathLike[str]) -> AbstractFileSystem:
    """Return the file system of a path or a URL such as ``s3://bucket/last.ckpt``."""
    return url_to_fs(str(path))[0]
