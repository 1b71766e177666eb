"""Living groups of processes that take jobs.

A fit with two processes costs a tenth of a second in a group that lives, and five seconds in fresh interpreters. The
processes are forked from a server that has imported torch and lightning and does nothing else, so a fork never copies
the threads or the state of the process that runs the tests, and a group that hangs is remade in a moment.
"""

from __future__ import annotations

import datetime
import functools
import gc
import logging
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from typing import Any

_context = multiprocessing.get_context("forkserver")
_GRACE = 2.0  # Seconds that the other processes get to finish after one of them has failed.


def start_server() -> None:
    """Start importing in the background; called early, the imports overlap with those of the tests."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read by torch when the server imports it
    _context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torchmetrics", "lightning.pytorch"])
    forkserver.ensure_running()


class JobFailed(Exception):
    """A job raised, died or hung.

    Attributes:
        kind: The exception's name; ``"Died"`` or ``"Hung"`` if there was none. Of the first rank that failed.
        message: The exception's text.
    """

    def __init__(self, kind: str, message: str, details: str) -> None:
        super().__init__(f"{kind}: {message}\n{details}")
        self.kind = kind
        self.message = message


@dataclass(frozen=True)
class _Failure:
    kind: str
    message: str
    details: str


class Group:
    """Processes of one gloo group. They start with the first job, and again after a job that failed.

    Args:
        size: Number of processes.
        timeout: Seconds that a job may take. A job that takes longer is killed, and reported as ``JobFailed``.
    """

    def __init__(self, size: int = 2, timeout: float = 60.0) -> None:
        self.size = size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._folder = ""

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Call ``function(*args)``, a function of a module, in every process; the results in the order of ranks."""
        if not self._processes:
            self._start()
        job = pickle.dumps((function, args))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        results = self._collect(timeout or self.timeout)
        failures = [(rank, result) for rank, result in enumerate(results) if isinstance(result, _Failure)]
        if failures:
            # The ranks may stand at different collectives now, which the next job would take for its own.
            self.close()
            details = "\n".join(f"rank {rank}: {failure.details}" for rank, failure in failures)
            first = next((f for _, f in failures if f.kind != "Hung"), failures[0][1])
            raise JobFailed(first.kind, first.message, details)
        return results

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes, self._folder = [], [], ""

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        start_server()
        self._folder = tempfile.mkdtemp(prefix="group-")
        for rank in range(self.size):
            here, there = _context.Pipe()
            process = _context.Process(target=_work, args=(there, rank, self.size, self._folder), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def _collect(self, timeout: float) -> list[Any]:
        hung = _Failure("Hung", f"no result after {timeout:g} seconds", "killed")
        results: list[Any] = [hung] * self.size
        waiting = dict(zip(self._pipes, range(self.size), strict=True))
        deadline = time.monotonic() + timeout
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, connection.Connection)
                rank = waiting.pop(pipe)
                results[rank] = self._receive(pipe, rank)
                if isinstance(results[rank], _Failure):
                    deadline = min(deadline, time.monotonic() + _GRACE)
        return results

    def _receive(self, pipe: connection.Connection, rank: int) -> Any:
        try:
            return pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            self._processes[rank].join()
            return _Failure("Died", f"exit code {self._processes[rank].exitcode}", "the process ended")


def _work(pipe: connection.Connection, rank: int, size: int, folder: str) -> None:
    import torch
    import torch.distributed

    warnings.simplefilter("ignore")
    settle()
    # A file as the meeting point: a free port that is asked for can be taken before it is used.
    store = torch.distributed.FileStore(os.path.join(folder, "store"), size)
    # Longer than any job, so that the parent decides what hangs.
    patience = datetime.timedelta(minutes=10)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_answer(job))


def _answer(job: bytes) -> bytes:
    try:
        function, args = pickle.loads(job)
        return pickle.dumps(function(*args))
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return pickle.dumps(_Failure(type(error).__name__, str(error), traceback.format_exc()))


def settle() -> None:
    """One thread, a quiet Lightning, and no work that each fit would do again."""
    import torch
    from lightning.pytorch.trainer.connectors import callback_connector

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Each Trainer reads the metadata of all that is installed, to look for callbacks there.
    callback_connector._load_external_callbacks = functools.cache(callback_connector._load_external_callbacks)
    # What is there now stays: the collector need not walk through all of torch again and again.
    gc.collect()
    gc.freeze()
