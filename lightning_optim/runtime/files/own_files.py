"""Remember the checkpoints that this process wrote in a fit: only these are unpickled without the user's consent."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class OwnFiles:
    """Remember the paths to which a strategy wrote checkpoints in this process, in one fit.

    A checkpoint may hold hyper-parameters of any type, so that reading it takes pickle. The paths that a *loaded*
    checkpoint names, such as the best of a ``ModelCheckpoint``, may lead to a file of unknown origin: after a resume it
    is read with ``weights_only=True``, unless this process has written it again.

    Example::

        >>> own = OwnFiles()
        >>> own.add("run/best.ckpt.new")
        >>> own.rename("run/best.ckpt.new", "run/best.ckpt")
        >>> "run/best.ckpt" in own, "run/best.ckpt.new" in own
        (True, False)
    """

    def __init__(self) -> None:
        self._paths: set[str] = set()

    def recording(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the method ``save_checkpoint`` of a strategy so that it notes where it writes."""

        def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any) -> Any:
            result = save(checkpoint, filepath, *args, **kwargs)
            self.add(filepath)
            return result

        return save_checkpoint

    def add(self, path: str | os.PathLike[str]) -> None:
        """Note that this process has written a file or a folder."""
        self._paths.add(resolved(path))

    def rename(self, path: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
        """Note that a written file was moved from ``path`` to ``new``."""
        if path in self:
            self._paths.discard(resolved(path))
            self.add(new)

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        return resolved(path) in self._paths


def resolved(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a local file or folder, without links; a URL as it is."""
    name = os.fspath(path)
    return name if "://" in name else os.path.realpath(name)
