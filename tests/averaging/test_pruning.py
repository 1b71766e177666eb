"""Weights that are pruned while they are averaged: the average is pruned in validations, checkpoints and at the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune

from lightning_optim import EMA, LAWA, SWA, EarlyStopping, WeightAveraging, averaged_state_dict
from tests.averaging.models import Model, assert_close, assert_equal, differ, ema, fit, mean, snapshot
from tests.lightning import Callback, MisconfigurationException, ModelCheckpoint, ModelPruning

DECAY = 0.8
PRUNED = ("net.0.weight", "net.2.weight")
AVERAGES: dict[str, Any] = {
    "ema": (lambda: EMA(DECAY, warmup=None), lambda states: ema(states, DECAY)),
    "swa": (SWA, mean),
    "lawa": (lambda: LAWA(3), lambda states: mean(states[-3:])),
}


def pruning(**options: Any) -> ModelPruning:
    given = {"amount": 0.4, "parameter_names": ["weight"], "use_lottery_ticket_hypothesis": False}
    return ModelPruning("l1_unstructured", **(given | options))


def effective(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with which a pruned module computes."""
    return {
        name.removesuffix("_orig"): tensor * state[name.replace("_orig", "_mask")] if "_orig" in name else tensor
        for name, tensor in state.items()
        if "_mask" not in name
    }


def unmasked(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{n.removesuffix("_orig"): t for n, t in state.items() if "_mask" not in n} for state in states]


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name] == 0 for name in PRUNED}


def masked(state: dict[str, Tensor], where: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * ~where[name] if name in where else tensor for name, tensor in state.items()}


class Watching(Model):
    """A callback that records the weights in each validation and at the start of training."""

    def on_train_start(self) -> None:
        self.began = snapshot(self)

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self.validated[-1] = effective(self.validated[-1])


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_and_the_average_at_the_end(kind: str, first: bool, dtype: Any) -> None:
    make, reference = AVERAGES[kind]
    average, cut = WeightAveraging(make(), dtype=dtype, buffers="average"), pruning()
    fit(model := Watching(), [cut, average] if first else [average, cut], max_epochs=3)
    fit(alone := Watching(), [pruning()], max_epochs=3)
    where = zeros(snapshot(alone))
    assert all(0.7 < part.float().mean() < 0.85 for part in [torch.cat([w.flatten() for w in where.values()])])
    assert_close(snapshot(model), masked(reference(unmasked(model.trajectory)), where))
    assert_equal(zeros(snapshot(model)), where)
    assert differ(snapshot(model), snapshot(alone))
    with average.averaged_weights(other := Model()):
        assert_equal(snapshot(other), snapshot(model))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", AVERAGES)
def test_zeros_and_the_average_in_files(kind: str, first: bool, tmp_path: Path) -> None:
    make, reference = AVERAGES[kind]
    average, other = WeightAveraging(make(), buffers="average"), WeightAveraging(EMA(0.5), evaluate=False, name="other")
    files = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    callbacks = [pruning(), average, other, files] if first else [average, other, pruning(), files]
    model = Watching()
    fit(model, callbacks, enable_checkpointing=True, max_epochs=3)
    for epoch in range(3):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        where = zeros(saved["state_dict"])
        assert 0.3 < where["net.0.weight"].float().mean() < 0.95
        states = unmasked(model.trajectory[: 8 * (epoch + 1)])
        assert_close(saved["state_dict"], masked(reference(states), where))
        assert_equal(saved["current_model_state"], masked(states[-1], where))
        second = averaged_state_dict(tmp_path / f"epoch={epoch}.ckpt", "other")
        assert second.keys() == saved["state_dict"].keys()
        assert all(bool(second[name][where[name]].eq(0).all()) for name in PRUNED)
        assert differ(second, saved["state_dict"])
    # What a validation computes with is pruned as the epoch before was.
    first_file = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert_close(model.validated[1], masked(reference(unmasked(model.trajectory[:16])), zeros(first_file)))


@pytest.mark.parametrize("kind", AVERAGES)
def test_a_resumed_run_begins_with_what_the_file_holds(kind: str, tmp_path: Path) -> None:
    """Lightning's pruning saves no masks: a resumed run begins with the zeros of the checkpoint, which may move."""
    make, _ = AVERAGES[kind]
    files = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(Model(), [WeightAveraging(make()), pruning(), files], enable_checkpointing=True, max_epochs=3)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    found = []

    class Looks(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            with average.averaged_weights(pl_module):
                found.append(snapshot(pl_module))

    average, model = WeightAveraging(make()), Watching()
    fit(model, [average, pruning(), Looks()], ckpt=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert_equal(model.began, saved["current_model_state"])
    assert_close(found[0], saved["state_dict"])
    assert average.steps == [24]
    assert any(bool((snapshot(model)[name] == 0).any()) for name in PRUNED)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("in_directory", [True, False])
def test_early_stopping_ends_with_the_zeros_of_its_best(first: bool, in_directory: bool, tmp_path: Path) -> None:
    class Scripted(Watching):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", (3.0, 1.0, 2.0, 4.0)[self.current_epoch])

    model, files = Scripted(), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    stop = EarlyStopping("val_loss", patience=math.inf, dirpath=str(tmp_path / "best") if in_directory else None)
    ours = [WeightAveraging(SWA()), stop]
    callbacks = [pruning(amount=0.2), *ours, files] if first else [*ours, pruning(amount=0.2), files]
    fit(model, callbacks, enable_checkpointing=True, max_epochs=4)
    best, last = (torch.load(tmp_path / f"epoch={n}.ckpt", weights_only=True)["state_dict"] for n in (1, 3))
    assert_close(snapshot(model), best)
    assert_equal(zeros(snapshot(model)), zeros(best))
    assert best["net.0.weight"].eq(0).sum() < last["net.0.weight"].eq(0).sum()


@pytest.mark.parametrize("permanent", [True, False])
def test_with_the_lottery_ticket_and_without_permanence(permanent: bool) -> None:
    options = {"use_lottery_ticket_hypothesis": True, "make_pruning_permanent": permanent}
    model, alone = Watching(), Watching()
    fit(model, [WeightAveraging(EMA(DECAY, warmup=None)), pruning(**options)])
    fit(alone, [pruning(**options)])
    where = zeros(effective(snapshot(alone)))
    assert_close(effective(snapshot(model)), masked(ema(unmasked(model.trajectory), DECAY), where))


@pytest.mark.parametrize("when", ["on_train_epoch_end", "on_validation_end", "on_train_end"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_manual_pruning_that_ends_within_the_run_ends_in_the_average_too(when: str, dtype: Any) -> None:
    """Weights move again from there on, and the average goes on from zeros like the weights."""

    class ByHand(Watching):
        def on_train_start(self) -> None:
            super().on_train_start()
            prune.random_unstructured(self.net[0], "weight", 0.5)
            self.mask = self.net[0].weight_mask.clone()

        def remove(self, *_: Any) -> None:
            if "weight_mask" in dict(self.net[0].named_buffers()) and self.trainer.current_epoch >= 1:
                prune.remove(self.net[0], "weight")
                self.removed_at = len(self.trajectory)

    class Removes(Callback):
        pass

    removes = Removes()
    setattr(removes, when, lambda trainer, pl_module: pl_module.remove())
    model = ByHand()
    fit(model, [WeightAveraging(SWA(), dtype=dtype), removes], max_epochs=2 if when == "on_train_end" else 3)
    states = unmasked(model.trajectory)
    until = [{**state, "net.0.weight": state["net.0.weight"] * model.mask} for state in states[: model.removed_at]]
    assert_close(snapshot(model), mean([*until, *states[model.removed_at :]]))
    if when != "on_train_end":
        assert_close({"w": model.trajectory[16]["net.0.weight"].ne(0).float().mean()}, {"w": torch.tensor(1.0)})


def test_a_reset_within_a_validation_is_refused() -> None:
    cut = pruning(prune_on_train_epoch_end=False, use_lottery_ticket_hypothesis=True)
    with pytest.raises(MisconfigurationException, match=r"ModelPruning\(prune_on_train_epoch_end=False\) sets weights"):
        fit(Model(), [WeightAveraging(SWA()), cut])
    fit(Model(), [WeightAveraging(SWA(), evaluate=False), cut])
    model = Watching()
    fit(model, [WeightAveraging(SWA()), pruning(prune_on_train_epoch_end=False)])
    assert (snapshot(model)["net.0.weight"] == 0).float().mean() > 0.5
    assert_close(snapshot(model), masked(mean(unmasked(model.trajectory)), zeros(snapshot(model))))
