"""Test that a checkpoint of an exact resume holds the non-persistent buffers that change in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_optim.resume.exact_resume import ExactResume
from tests.integration.forked_processes import killed
from tests.resume.killed_runs import WriteAndDie, difference, fit
from tests.resume.models import Net


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


def test_buffers_that_no_state_dict_holds(tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    killed(lambda: fit([ExactResume(), WriteAndDie("on_train_batch_end", 8, path)], net=NetWithUnsavedBuffers))
    saved = torch.load(path, weights_only=True)["callbacks"]["ExactResume"]["buffers"]
    assert set(saved) == {"scale", "recent"}, "the constant is made anew"
    resumed = fit([ExactResume()], path=path, seed=2, net=NetWithUnsavedBuffers)
    assert difference(resumed, fit([], net=NetWithUnsavedBuffers)) == ""
