"""Fork processes for one job in which they may be killed: a single one, or the ranks of a fresh gloo group."""

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

TIMEOUT = 120.0  # Seconds after which a job is considered to hang.


@dataclass
class End:
    """End of a process: the number of the signal that killed it, or 0, and its result, or ``None``."""

    signal: int
    result: Any


def in_forks(count: int, job: Callable[..., Any], *args: Any) -> list[End]:
    """Call ``job(*args)`` in each of ``count`` forked processes, which form a process group if there are several."""
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        pids = [_fork(rank, count, Path(folder), job, args) for rank in range(count)]
        codes = _wait(pids)
        return [End(max(0, -code), _result(Path(folder), rank)) for rank, code in enumerate(codes)]


def killed(run: Callable[[], Any]) -> None:
    """Call ``run()`` in a forked process, which must die by SIGKILL."""
    (end,) = in_forks(1, run)
    assert end.signal == signal.SIGKILL, end


def results(count: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``job(*args)`` in each of ``count`` forked processes and return the results, in the order of ranks."""
    ends = in_forks(count, job, *args)
    assert all(end.result is not None for end in ends), f"no result: {ends}; the traceback is on stderr"
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
    """Wait for processes and return their exit codes: minus the number of a signal, as with ``subprocess``."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + TIMEOUT
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
    """Kill all ranks with SIGKILL, so that no hook and no exception follows.

    No rank is killed before all have come here, since a rank that waits for a dead one would raise.
    """
    (folder / f"dying-{rank}").touch()
    while any(not (folder / f"dying-{other}").exists() for other in range(count)):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
