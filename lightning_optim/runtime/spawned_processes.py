"""Callbacks of a fit that ran in other processes (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``) and ended there.

The launching process keeps its own callbacks, to which nothing has happened. Of the processes that trained, Lightning
brings back the module's weights and ``trainer.callback_metrics``. Here the attributes of our callbacks come back too:
process 0 writes them to a file, and sends its path with Lightning's results, through a pipe that is too small for more.
When the launching process unpickles the results, its callbacks get the attributes, and the file is removed. Weights
that callbacks hold beside the module's stay there, and an error says so where they are asked for.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from lightning_optim.runtime.lightning import Trainer, rank_zero_warn
from lightning_optim.runtime.order import SessionCallback

_here: WeakValueDictionary[int, SessionCallback] = WeakValueDictionary()
"""The callbacks of this process, by their ``id``."""


def remember(callback: SessionCallback) -> None:
    """Register a new callback, to be found when its attributes come back from other processes."""
    _here[id(callback)] = callback


def send_back(trainer: Trainer, callbacks: list[SessionCallback]) -> None:
    """In a process that was launched: add the attributes of callbacks to what it returns when it ends."""
    launcher: Any = trainer.strategy.launcher
    if not hasattr(launcher, "get_extra_results"):
        return
    collect: Callable[[Trainer], dict[str, Any]] = launcher.get_extra_results
    forked = getattr(launcher, "_start_method", "spawn") == "fork"  # a fork leaves each object where it was

    def get_extra_results(trainer: Trainer) -> dict[str, Any]:
        origins = [id(callback) if forked else callback.launcher_id for callback in callbacks]
        folder = Path(tempfile.mkdtemp(prefix="lightning_optim-"))
        parcels = [_write(callback, origin, folder) for callback, origin in zip(callbacks, origins, strict=True)]
        return {**collect(trainer), "lightning_optim": _Returned(str(folder), parcels)}

    launcher.get_extra_results = get_extra_results  # for the rest of this process, which ends with it


@dataclass
class _Parcel:
    """One callback: where it is in the launching process, and the file with its attributes, or why there is none."""

    origin: int | None
    kind: str
    path: str
    failure: str


class _Returned:
    """Results on their way back; unpickling them gives the callbacks of the launching process their attributes."""

    def __init__(self, folder: str, parcels: list[_Parcel]) -> None:
        self.folder, self.parcels = folder, parcels

    def __reduce__(self) -> Any:
        return _receive, (self.folder, self.parcels)


def _write(callback: SessionCallback, origin: int | None, folder: Path) -> _Parcel:
    out = {*callback.stays, "launcher_id", "ran_elsewhere", "not_returned"}
    # A Trainer or a module of this process is no use in the other.
    sent = {
        name: value
        for name, value in callback.__getstate__().items()
        if name not in out and not isinstance(value, Trainer | nn.Module)
    }
    path, failure = folder / f"{origin}.pt", ""
    try:
        torch.save(sent, path)
    except Exception as error:  # of any kind: pickling runs the code of the user's attributes
        failure = f"{type(error).__name__}: {error}"
    return _Parcel(origin, type(callback).__qualname__, str(path), failure)


def _receive(folder: str, parcels: Iterable[_Parcel]) -> None:
    for parcel in parcels:
        callback = _here.get(parcel.origin or 0)
        if callback is None or type(callback).__qualname__ != parcel.kind:
            continue
        callback.ran_elsewhere = True
        try:
            if parcel.failure:
                raise RuntimeError(parcel.failure)
            callback.__dict__.update(_read(parcel.path))
        except Exception as error:
            callback.not_returned = str(error)
            rank_zero_warn(f"{_reason(callback)} Its attributes here are those from before the fit.")
    shutil.rmtree(folder, ignore_errors=True)


def _read(path: str) -> dict[str, Any]:
    # What the program's own module defines is of a module of this name in a process that was spawned.
    before = sys.modules.get("__mp_main__")
    sys.modules["__mp_main__"] = before or sys.modules["__main__"]
    try:
        # A process of ours wrote it a moment ago.
        return torch.load(path, map_location="cpu", weights_only=False)
    finally:
        if before is None:
            del sys.modules["__mp_main__"]


def check_not_lost(callback: SessionCallback) -> None:
    """Raise if the callback's last fit ran in other processes, and its attributes did not come back.

    Raises:
        RuntimeError: With the reason, and what to do instead.
    """
    if callback.not_returned:
        raise RuntimeError(f'{_reason(callback)} Train with `strategy="ddp"`, or load a checkpoint of that fit.')


def check_weights_are_here(callback: SessionCallback, what: str, remedy: str) -> None:
    """Raise if the callback's last fit ran in other processes, in which its weights stayed.

    Args:
        callback: The callback that is asked for weights.
        what: Which weights these are.
        remedy: Where else they are, or what to change, in a sentence.

    Raises:
        RuntimeError: With the remedy.
    """
    if callback.ran_elsewhere:
        raise RuntimeError(
            f"The fit ran in other processes (a strategy such as `ddp_spawn`), and {what} of {type(callback).__name__}"
            f" stayed there: only the module's weights come back. {remedy}"
        )


def _reason(callback: SessionCallback) -> str:
    name = type(callback).__name__
    return f"The fit ran in other processes, and what {name} holds could not be brought back: {callback.not_returned}."
