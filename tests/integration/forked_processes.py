"""Processes that are forked for one job and may be killed in it: alone, or as the ranks of a fresh gloo group."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

PATIENCE = 120.0  # Seconds after which a job hangs.


@dataclass
class End:
    """How a process ended: by which signal, if by one, or with which result."""

    signal: int
    result: Any


def in_forks(count: int, job: Callable[..., Any], *args: Any) -> list[End]:
    """Call ``job(*args)`` in each of ``count`` forked processes, which form a group if they are several."""
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        pids = [_fork(rank, count, Path(folder), job, args) for rank in range(count)]
        codes = _wait(pids)
        return [End(max(0, -code), _result(Path(folder), rank)) for rank, code in enumerate(codes)]


def killed(run: Callable[[], Any]) -> None:
    """Call ``run()`` in a forked process, which must die by SIGKILL."""
    (end,) = in_forks(1, run)
    assert end.signal == signal.SIGKILL, end


def results(count: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """What each process returned."""
    ends = in_forks(count, job, *args)
    assert all(end.result is not None for end in ends), f"no result: {ends}; what it said is on stderr"
    return [end.result for end in ends]


def _fork(rank: int, count: int, folder: Path, job: Callable[..., Any], args: tuple[Any, ...]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads
        pid = os.fork()
    if pid:
        return pid
    try:
        if count > 1:
            store = torch.distributed.FileStore(str(folder / "store"), count)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
        result = pickle.dumps(job(*args))
        (folder / f"{rank}.pickle").write_bytes(result)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _wait(pids: list[int]) -> list[int]:
    """The exit codes; the negative number of the signal, as with ``subprocess``."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < len(pids):
        for pid in (pid for pid in pids if pid not in codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def _result(folder: Path, rank: int) -> Any:
    path = folder / f"{rank}.pickle"
    return pickle.loads(path.read_bytes()) if path.exists() else None


def die_together(folder: Path, rank: int, count: int) -> None:
    """SIGKILL, as by a scheduler: no hook, no exception. No rank is gone while another still waits for it."""
    (folder / f"dying-{rank}").touch()
    while any(not (folder / f"dying-{other}").exists() for other in range(count)):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
