"""Bring the attributes of callbacks back from the processes of ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook``.

After such a fit the callbacks of the launching process are as before it: Lightning brings back only the module's
weights and ``trainer.callback_metrics`` from the processes that trained. Here process 0 also writes the attributes of
its callbacks to temporary files, and sends their paths with Lightning's results, since the pipe is too small for more.
When the launching process unpickles the results, its callbacks get the attributes, and the files are removed. Weights
that callbacks hold beside the module's are not sent, and an error says so where they are asked for.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_optim.runtime.lightning import Trainer, rank_zero_warn
from lightning_optim.runtime.lightning.strategies import launches_processes
from lightning_optim.runtime.order import SessionCallback
from lightning_optim.runtime.ran_elsewhere import begins_fit, find, reason_lost


def send_back(trainer: Trainer, callbacks: list[SessionCallback]) -> None:
    """Add the attributes of callbacks to what a launched process returns when it ends; a no-op in any other process."""
    launcher: Any = trainer.strategy.launcher
    if not launches_processes(trainer):
        return
    collect: Callable[[Trainer], dict[str, Any]] = launcher.get_extra_results

    def get_extra_results(trainer: Trainer) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(prefix="lightning_optim-"))
        returned = [_write(callback, folder) for callback in callbacks]
        return {**collect(trainer), "lightning_optim": _ReturnedCallbacks(str(folder), returned)}

    launcher.get_extra_results = get_extra_results  # for the rest of this process, which ends with it


@dataclass
class _ReturnedCallback:
    """Describe one callback that is sent back.

    Attributes:
        tokens: Its token, which it has in the launching process too if that was forked, and those of its ancestors.
        kind: The name of its class.
        path: The file with its attributes.
        failure: The reason why there is no such file.
    """

    tokens: tuple[str, ...]
    kind: str
    path: str
    failure: str


class _ReturnedCallbacks:
    """Hold callbacks that are sent back: unpickling sets the attributes of those of the launching process."""

    def __init__(self, folder: str, returned: list[_ReturnedCallback]) -> None:
        self.folder, self.returned = folder, returned

    def __reduce__(self) -> Any:
        return _receive, (self.folder, self.returned)


def _write(callback: SessionCallback, folder: Path) -> _ReturnedCallback:
    out = {*callback.stays, "_token", "_ancestors", "ran_in", "not_returned"}
    # A Trainer or a module of this process is useless in the other.
    sent = {
        name: value
        for name, value in callback.__getstate__().items()
        if name not in out and not isinstance(value, Trainer | nn.Module)
    }
    path, failure = folder / f"{callback._token}.pt", ""
    try:
        torch.save(sent, path)
    except Exception as error:  # pickling runs code of the user's attributes, which may raise anything
        failure = f"{type(error).__name__}: {error}"
    return _ReturnedCallback((*callback._ancestors, callback._token), type(callback).__qualname__, str(path), failure)


def _receive(folder: str, returned: Iterable[_ReturnedCallback]) -> None:
    for one in returned:
        callback = find(one.tokens)
        if callback is None or type(callback).__qualname__ != one.kind:
            continue
        begins_fit(callback)
        callback.ran_in = "other processes"
        try:
            if one.failure:
                raise RuntimeError(one.failure)
            callback.__dict__.update(_read(one.path))
        except Exception as error:
            callback.not_returned = str(error)
            rank_zero_warn(
                f"{reason_lost(callback)} Its attributes here are those from before the fit. Remove the attribute that"
                ' cannot be pickled, or train with `strategy="ddp"`.'
            )
    shutil.rmtree(folder, ignore_errors=True)


def _read(path: str) -> dict[str, Any]:
    # A spawned process knows the classes of the program's main module under this module's name.
    before = sys.modules.get("__mp_main__")
    sys.modules["__mp_main__"] = before or sys.modules["__main__"]
    try:
        # Another process of this program has just written it.
        return torch.load(path, map_location="cpu", weights_only=False)
    finally:
        if before is None:
            del sys.modules["__mp_main__"]
