"""Checkpoints that are written after a fit which ended with an average of checkpoints, or the best of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import CheckpointAveraging
from tests.lightning import ModelCheckpoint
from tests.stopping.scripted_fits import Scripted, fit, same, weights

SCORES = [3.0, 1.0, 2.0, 2.5, 0.5]


def callbacks(folder: Path) -> list[Any]:
    return [CheckpointAveraging(top=2), ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=2)]


@pytest.mark.parametrize("mean_wins", [True, False])
def test_a_run_resumes_from_the_raw_weights(mean_wins: bool, tmp_path: Path) -> None:
    class Meaning(Scripted):
        """A model whose validation of the average is the last one."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if not self.trainer.callbacks:  # the validation of the mean
                self.scores = {"val_loss": [0.0 if mean_wins else 9.0] * 3}
            super().validation_step(batch, batch_idx)

    whole, first, again = Scripted(SCORES), Meaning(SCORES), Scripted(SCORES)
    fit(whole, max_epochs=5)
    ours, saver = callbacks(tmp_path / "first")
    trainer = fit(first, ours, saver, max_epochs=3, enable_checkpointing=True)
    assert ("average" in ours.best_path) == mean_wins
    final = weights(first)
    assert not same(final, whole.seen[2])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert same(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"], final)
    fit(
        again,
        *callbacks(tmp_path / "again"),
        max_epochs=5,
        ckpt_path=tmp_path / "after.ckpt",
        enable_checkpointing=True,
    )
    assert all(same(one, other) for one, other in zip(again.seen[:2], whole.seen[3:], strict=True))


def test_a_best_that_cannot_be_read_displaces_nothing(tmp_path: Path) -> None:
    class Breaking(Scripted):
        def on_train_end(self) -> None:
            Path(ours.best_path).write_bytes(b"PK\x03\x04 broken")

    module = Breaking(SCORES)
    ours, saver = callbacks(tmp_path)
    with pytest.warns(UserWarning, match="CheckpointAveraging leaves the module as it is"):
        fit(module, ours, saver, max_epochs=3, enable_checkpointing=True)
    assert same(weights(module), module.seen[2])
    assert "raw" not in ours.state_dict()
