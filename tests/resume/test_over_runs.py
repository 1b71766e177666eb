"""ExactResume says what is not exact, leaves nothing behind, and keeps out of the way."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder

from lightning_optim.resume.exact_resume import ExactResume
from lightning_optim.runtime.random_state import random_state, set_random_state_
from tests.resume.helpers import WriteAndDie, difference, fit, killed
from tests.resume.models import Net, PositionLoader, shuffling


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.ckpt"


# ---- what is not exact is said ---------------------------------------------------------------------------------------


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


# ---- life ------------------------------------------------------------------------------------------------------------


def test_changes_nothing_in_a_run_that_is_not_killed() -> None:
    assert difference(fit([ExactResume()]), fit([])) == ""


class Sanity(Callback):
    checks = 0

    def on_sanity_check_start(self, *_: Any) -> None:
        self.checks += 1


def test_no_sanity_check_on_resume(path: Path) -> None:
    killed(lambda: fit([ExactResume(), WriteAndDie("on_train_epoch_end", 1, path)]))
    sanity = Sanity()
    fit([ExactResume(), sanity], path=path)
    assert sanity.checks == 0
    fit([ExactResume(), sanity])
    assert sanity.checks == 1


def test_learning_rate_finder_goes_by() -> None:
    def finder() -> LearningRateFinder:
        return LearningRateFinder(num_training_steps=8, early_stop_threshold=None, attr_name="rate", update_attr=False)

    assert difference(fit([ExactResume(), finder()], net=RateNet), fit([finder()], net=RateNet)) == ""


class RateNet(Net):
    rate = 0.01


def test_leaves_nothing_installed_and_no_state_for_validate(path: Path) -> None:
    killed(lambda: fit([ExactResume(), WriteAndDie("on_train_batch_end", 9, path)]))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = ExactResume()
    trainer = Trainer(
        callbacks=[callback], max_epochs=3, accelerator="cpu", devices=1, enable_checkpointing=False, **quiet
    )
    loops = (trainer, trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop)
    before = [{name for name, value in vars(loop).items() if callable(value)} for loop in loops]
    trainer.validate(Net(), ckpt_path=path, verbose=False)
    assert callback.extra_state() == {}
    trainer.fit(Net(), PositionLoader(), ckpt_path=path)
    assert trainer.num_sanity_val_steps == 2
    assert [{name for name, value in vars(loop).items() if callable(value)} for loop in loops] == before
    for copied in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert copied.state_key == "ExactResume"
        assert copied.extra_state() == {}


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(3).tolist(), random.random, lambda: np.random.standard_normal(3).tolist()]
)
def test_random_state_is_plain_and_whole(draw: Callable[[], Any], tmp_path: Path) -> None:
    draw()  # an odd number of normal draws leaves one in store
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    set_random_state_(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


# ---- what no state_dict holds ----------------------------------------------------------------------------------------


class NetWithUnsavedBuffers(Net):
    """Scales its loss by a running mean, which grows once, and by a constant; no ``state_dict`` holds them."""

    def __init__(self) -> None:
        super().__init__(random=False)
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.register_buffer("recent", None, persistent=False)
        self.register_buffer("constant", torch.full((3, 1), 0.5).expand(3, 4), persistent=False)

    def training_step(self, batch: list[Any], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        recent = [] if self.recent is None else list(self.recent)
        self.recent = torch.stack([*recent[-3:], loss.detach()])
        self.scale.lerp_(self.recent.mean(), 0.1)
        return loss * self.scale * self.constant.mean()


def test_buffers_that_no_state_dict_holds(path: Path) -> None:
    killed(lambda: fit([ExactResume(), WriteAndDie("on_train_batch_end", 8, path)], net=NetWithUnsavedBuffers))
    saved = torch.load(path, weights_only=True)["callbacks"]["ExactResume"]["buffers"]
    assert set(saved) == {"scale", "recent"}, "the constant is made anew"
    resumed = fit([ExactResume()], path=path, seed=2, net=NetWithUnsavedBuffers)
    assert difference(resumed, fit([], net=NetWithUnsavedBuffers)) == ""
