"""Run jobs in groups of processes that live from job to job.

A fit of two processes takes a tenth of a second in a living group, and five seconds in fresh interpreters. The
processes are forked from a server that has imported torch and lightning and does nothing else, so that a fork never
copies the threads or the state of the test process, and a group that hangs is quickly replaced.
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

from tests.lightning import PACKAGE

_context = multiprocessing.get_context("forkserver")
_GRACE = 2.0  # Seconds that the other processes get to finish after one of them has failed.


def start_server() -> None:
    """Start the imports of the server in the background, so that they overlap with those of the tests."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read by torch when the server imports it
    _context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torchmetrics", PACKAGE])
    forkserver.ensure_running()


class JobFailed(Exception):
    """A job raised an exception, was killed or hung.

    Attributes:
        kind: Name of the exception of the first rank that failed; ``"Died"`` or ``"Hung"`` without an exception.
        message: Text of the exception.
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
    """Processes of one gloo group, which start with the first job, and again after a job that failed.

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
        """Call ``function(*args)`` in every process and return the results in the order of ranks.

        Raises:
            JobFailed: If a process raises, dies or takes longer than ``timeout`` seconds.
        """
        if not self._processes:
            self._start()
        job = pickle.dumps((function, args))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        results = self._collect(timeout or self.timeout)
        failures = [(rank, result) for rank, result in enumerate(results) if isinstance(result, _Failure)]
        if failures:
            # The ranks may be at different collectives now, with which those of the next job would be matched.
            self.close()
            details = "\n".join(f"rank {rank}: {failure.details}" for rank, failure in failures)
            first = next((f for _, f in failures if f.kind != "Hung"), failures[0][1])
            raise JobFailed(first.kind, first.message, details)
        return results

    def close(self) -> None:
        """Kill the processes."""
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
    # The ranks meet in a file: another process could take a free port before it is used.
    store = torch.distributed.FileStore(os.path.join(folder, "store"), size)
    # Longer than any job, so that the parent decides that a job hangs.
    patience = datetime.timedelta(minutes=10)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    mend_means()
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


def mend_means() -> None:
    """Let gloo's ``reduce_scatter`` divide where a mean is asked: before torch 2.9 it returns the sum, without a word.

    FSDP2 asks for a mean, so there it trains with twice the gradient on two processes, also without this package. On
    GPUs the mean is right.
    """
    import torch
    import torch.distributed as dist

    reduce_scatter, sum_of, mean_of = dist.reduce_scatter_tensor, dist.ReduceOp.SUM, dist.ReduceOp.AVG
    received = torch.empty(1)
    reduce_scatter(received, torch.ones(dist.get_world_size()), op=mean_of)
    if received.item() == 1:
        return

    def divided(output: Any, input: Any, op: Any = sum_of, group: Any = None, async_op: bool = False) -> Any:
        assert not (async_op and op == mean_of)
        work = reduce_scatter(output, input, op=sum_of if op == mean_of else op, group=group, async_op=async_op)
        if op == mean_of:
            output.div_(dist.get_world_size(group))
        return work

    dist.reduce_scatter_tensor = divided


def settle() -> None:
    """Use one thread, silence Lightning, and do once what each fit would do again."""
    import torch

    from tests.lightning import callback_connector

    torch.set_num_threads(1)
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    # Each Trainer reads the metadata of all installed packages to look for callbacks.
    callback_connector._load_external_callbacks = functools.cache(callback_connector._load_external_callbacks)
    # The objects that exist now stay: the garbage collector need not walk through all of torch again and again.
    gc.collect()
    gc.freeze()
