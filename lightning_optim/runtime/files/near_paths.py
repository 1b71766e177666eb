"""Answer a path that does not exist with the nearest one that does, for a message."""

from __future__ import annotations

import os
from pathlib import PurePath

from lightning_optim.base.suggestions import did_you_mean, nearest_name


def nearest_path(path: str) -> str:
    """Return the end of a message about a missing file: the nearest path, or the part of this path that is missing.

    Each folder of the path is looked for, and the nearest name taken in place of one that does not exist.
    """
    if any(letter in path for letter in "*?["):
        return "; no file matches this pattern"
    if "://" in path:
        return "; check the path"
    *folders, name = PurePath(path).parts
    found, missing = "", ""
    for folder in folders:
        there = os.path.join(found, folder)
        if not os.path.isdir(there):
            missing = missing or there
            near = nearest_name(folder, [one for one in _names_in(found) if os.path.isdir(os.path.join(found, one))])
            if not near:
                return f"; there is no folder {missing!r}"
            there = os.path.join(found, near)
        found = there
    whole = os.path.join(found, name)
    if not os.path.exists(whole):
        near = nearest_name(name, _names_in(found))
        whole = os.path.join(found, near) if near else found if missing else ""
    return (f"; there is no folder {missing!r}" if missing else "") + did_you_mean(whole) or "; check the path"


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")
    except OSError:
        return []
