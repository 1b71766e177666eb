"""Groups of processes: results by rank, and every way in which a job fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed

from tests.harness.process_group import Group, JobFailed


@pytest.fixture(scope="module")
def pair() -> Iterator[Group]:
    with Group(2, timeout=30.0) as pair:
        yield pair


def add_ranks(factor: float) -> tuple[int, float]:
    total = torch.tensor([torch.distributed.get_rank() + 1.0])
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), factor * float(total)


def hang_on_rank(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        time.sleep(60)


def fail_on_rank(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        raise ValueError(f"of rank {rank}")
    torch.distributed.barrier()


def die_on_rank(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_the_order_of_ranks(pair: Group) -> None:
    assert pair.run(add_ranks, 2.0) == [(0, 6.0), (1, 6.0)]


def test_processes_live_from_job_to_job(pair: Group) -> None:
    assert pair.run(os.getpid) == pair.run(os.getpid)


def test_a_failure_is_reported_although_the_other_rank_waits_for_it(pair: Group) -> None:
    with pytest.raises(JobFailed, match="of rank 1") as error:
        pair.run(fail_on_rank, 1)
    assert error.value.kind == "ValueError"
    assert "fail_on_rank" in str(error.value), "no traceback"
    assert pair.run(add_ranks, 1.0) == [(0, 3.0), (1, 3.0)], "the group was not remade"


def test_a_job_that_hangs_is_killed(pair: Group) -> None:
    before = pair.run(os.getpid)
    with pytest.raises(JobFailed, match=r"no result after 0\.5 seconds"):
        pair.run(hang_on_rank, 0, timeout=0.5)
    assert set(before).isdisjoint(pair.run(os.getpid))


def test_a_process_that_is_killed_is_reported(pair: Group) -> None:
    with pytest.raises(JobFailed, match=rf"exit code -{signal.SIGKILL}") as error:
        pair.run(die_on_rank, 0)
    assert error.value.kind == "Died"
