"""Test that ExactResume warns if a resume is not exact, and says what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_optim.resume.exact_resume import ExactResume
from tests.integration.forked_processes import killed
from tests.resume.killed_runs import WriteAndDie, fit
from tests.resume.models import PositionLoader, shuffling


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.ckpt"


class LoaderWithWorkers(PositionLoader):
    num_workers = 2
    persistent_workers = True


def test_warns_of_a_loader_without_position(path: Path) -> None:
    killed(lambda: fit([ExactResume(), WriteAndDie("on_train_batch_end", 8, path)], shuffling))
    with pytest.warns(UserWarning, match="not exact: .*does not save its position: give it"):
        fit([ExactResume()], shuffling, path)


def test_warns_of_workers(path: Path) -> None:
    killed(lambda: fit([ExactResume(), WriteAndDie("on_train_batch_end", 8, path)], LoaderWithWorkers))
    with pytest.warns(UserWarning, match="set `num_workers=0`.*set `persistent_workers=False`"):
        fit([ExactResume()], LoaderWithWorkers, path)


def test_warns_of_a_lost_window(path: Path) -> None:
    killed(lambda: fit([ExactResume(), WriteAndDie("on_train_batch_end", 9, path)], accumulate_grad_batches=2))
    with pytest.warns(UserWarning, match="use `GradientAccumulation`"):
        fit([ExactResume()], path=path, accumulate_grad_batches=2)


def test_warns_of_a_file_from_inside_a_batch(path: Path) -> None:
    killed(lambda: fit([ExactResume(), WriteAndDie("on_before_optimizer_step", 8, path)]))
    with pytest.warns(UserWarning, match="inside a training batch: write it in `on_train_batch_end`"):
        fit([ExactResume()], path=path)


def test_warns_of_a_file_without_state_and_still_validates(path: Path) -> None:
    killed(lambda: fit([WriteAndDie("on_train_batch_end", 9, path)]))
    with pytest.warns(UserWarning, match="written without `ExactResume`"):
        resumed = fit([ExactResume()], path=path)
    assert sum(event[0] == "validated" for event in resumed["events"]) == 6


def test_warns_of_another_number_of_processes(path: Path) -> None:
    killed(lambda: fit([ExactResume(), WriteAndDie("on_train_batch_end", 9, path)]))
    file = torch.load(path, weights_only=True)
    file["callbacks"]["ExactResume"]["ranks"] *= 2
    torch.save(file, path)
    with pytest.warns(UserWarning, match="2 processes wrote the checkpoint and 1 read it"):
        fit([ExactResume()], path=path)
