"""Test a frozen base that the module leaves out of its checkpoints, and so does the best, until it is trained."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import EMA, EarlyStopping, WeightAveraging
from tests.lightning import ModelCheckpoint
from tests.stopping.scripted_fits import Scripted, after, fit, same, weights

WORSE = [1.0, 2.0, 3.0]


def stopping(tmp_path: Path, in_directory: bool) -> EarlyStopping:
    return EarlyStopping("val_loss", patience=math.inf, dirpath=str(tmp_path / "best") if in_directory else None)


class Adapted(Scripted):
    """Leave the frozen base out of checkpoints, in `on_save_checkpoint`."""

    def __init__(self, scores: Any = WORSE) -> None:
        super().__init__(scores)
        self.strict_loading = False
        self.base = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([self.base(batch[0]), batch[1]], batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in [name for name in checkpoint["state_dict"] if name.startswith("base")]:
            if not self.base[0].weight.requires_grad:
                del checkpoint["state_dict"][name]


class Overriding(Adapted):
    """Leave the frozen base out of checkpoints, in `state_dict`."""

    def state_dict(self) -> Any:  # type: ignore[override]
        return {name: tensor for name, tensor in super().state_dict().items() if not name.startswith("base")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        pass


def names_of_best(path: Path) -> set[str]:
    (state,) = [s for s in torch.load(path, weights_only=True)["callbacks"].values() if "best_check" in s]
    return {*state.get("best", ()), *state.get("raw", ())}


@pytest.mark.parametrize("kind", [Adapted, Overriding])
@pytest.mark.parametrize("average", [False, True])
def test_a_frozen_base_is_not_in_checkpoints(kind: Any, average: bool, tmp_path: Path) -> None:
    module, saver = kind([2.0, 1.0, 3.0]), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callbacks = [WeightAveraging(EMA(0.9))] if average else []
    callback = EarlyStopping("val_loss")
    trainer = fit(module, callback, saver, *callbacks, max_epochs=3, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trained = {name for name in module.seen[0] if not name.startswith("base")}
    assert {frozenset(names_of_best(path)) for path in tmp_path.glob("*.ckpt")} == {frozenset(trained)}
    moving = {"base.1.running_mean", "base.1.running_var", "base.1.num_batches_tracked"}
    assert {*callback.state_dict()["raw"]} == trained | moving, "statistics of a frozen layer move"
    assert same(weights(module), module.seen[1])


def test_a_frozen_base_is_not_in_a_checkpoint_after_a_fit_that_wrote_none(tmp_path: Path) -> None:
    module = Adapted()
    trainer = fit(module, EarlyStopping("val_loss"), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert not {"base.0.weight", "base.0.bias", "base.1.weight"} & names_of_best(tmp_path / "after.ckpt")
    again = Adapted([*WORSE, 4.0, 5.0])
    again.base.load_state_dict(module.base.state_dict())
    unfreeze = after(3, lambda module: module.base.requires_grad_(True))
    fit(again, EarlyStopping("val_loss", patience=math.inf), unfreeze, ckpt_path=tmp_path / "after.ckpt")
    assert not torch.equal(again.seen[1]["base.0.weight"], module.base[0].weight)
    assert same(weights(again), weights(module)), "the best is that of the first run"


def test_frozen_weights_that_checkpoints_hold_are_in_the_best(tmp_path: Path) -> None:
    """Keep them: a teacher that the user's code updates requires no gradient either."""

    class Teacher(Scripted):
        def __init__(self) -> None:
            super().__init__(WORSE)
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                for ours, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    ours.lerp_(theirs, 0.1)

    module = Teacher()
    saver = ModelCheckpoint(tmp_path, "last", every_n_epochs=1)
    trainer = fit(module, EarlyStopping("val_loss"), saver, max_epochs=3, enable_checkpointing=True)
    assert same(weights(module), module.seen[0])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert "teacher.0.weight" in names_of_best(tmp_path / "after.ckpt")


@pytest.mark.parametrize("in_directory", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_base_that_is_unfrozen_later(in_directory: bool, resumed: bool, tmp_path: Path) -> None:
    """Copy the base before the first step that trains it, and not while it is frozen."""

    def unfreeze(module: Any) -> None:
        module.base.requires_grad_(True)

    class Unfreezing(Adapted):
        def __init__(self, scores: Any) -> None:
            super().__init__(scores)
            del self.base[1]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_save_checkpoint(checkpoint)
            if in_directory:  # the checkpoint is the best itself
                checkpoint["state_dict"] = dict(self.state_dict())

    module = Unfreezing([3.0, 1.0, 2.0, 2.0])
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callbacks = [stopping(tmp_path, in_directory), saver, after(2, unfreeze)]
    options: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": True}
    fit(module, *callbacks, **options)
    assert not torch.equal(module.seen[3]["base.0.weight"], module.seen[1]["base.0.weight"])
    assert same(weights(module), module.seen[1])
    if resumed:
        again = Unfreezing([3.0, 1.0, 2.0, 2.0])
        again.base.load_state_dict(module.base.state_dict())
        others = [stopping(tmp_path, in_directory), after(2, unfreeze)]
        fit(again, *others, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=4)
        assert same(weights(again), module.seen[1])


def test_a_base_that_is_unfrozen_before_the_best(tmp_path: Path) -> None:
    """Keep weights that earlier checkpoints left out as soon as they are trained."""
    module, saver = Adapted([3.0, 2.0, 2.0, 1.0, 4.0]), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    unfreeze = after(2, lambda module: module.base.requires_grad_(True))
    fit(module, EarlyStopping("val_loss"), saver, unfreeze, max_epochs=5, enable_checkpointing=True)
    assert not torch.equal(module.seen[4]["base.0.weight"], module.seen[3]["base.0.weight"])
    assert same(weights(module), module.seen[3])


def test_a_base_that_is_unfrozen_after_state_was_restored_in_the_fit(tmp_path: Path) -> None:
    module, saver = Adapted([3.0, 1.0, 2.0, 2.0]), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callback = EarlyStopping("val_loss")
    restore = after(2, lambda _: callback.load_state_dict(copy.deepcopy(callback.state_dict())))
    unfreeze = after(3, lambda module: module.base.requires_grad_(True))
    fit(module, callback, saver, restore, unfreeze, max_epochs=4, enable_checkpointing=True)
    trained = [name for name in module.seen[1] if not name.startswith("base.1.")]
    assert not torch.equal(module.seen[3]["base.0.weight"], module.seen[1]["base.0.weight"])
    assert all(torch.equal(weights(module)[name], module.seen[1][name]) for name in trained)


def test_a_resumed_run_has_no_copy_of_a_frozen_base(tmp_path: Path) -> None:
    module, saver = Adapted([2.0, 1.0, 3.0]), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = fit(module, EarlyStopping("val_loss"), saver, max_epochs=3, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("epoch=1.ckpt", "after.ckpt"):
        again, callback, held = Adapted([2.0, 1.0, 3.0, 4.0]), EarlyStopping("val_loss"), set()
        again.base.load_state_dict(module.base.state_dict())
        looking = after(3, lambda _, c=callback, h=held: h.update(c.state_dict()["best"]))
        fit(again, callback, looking, max_epochs=4, ckpt_path=tmp_path / name)
        assert "net.0.weight" in held
        assert not {"base.0.weight", "base.0.bias", "base.1.weight"} & held
