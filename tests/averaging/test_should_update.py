"""An override of ``should_update`` is called when Lightning calls it and with the same arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import EMA, LAWA, SWA, EMAWeightAveraging, WeightAveraging
from tests.averaging.models import Model, assert_close, assert_equal, ema, fit, mean, norm_net, snapshot
from tests.lightning import Callback
from tests.lightning import EMAWeightAveraging as TheirEMA
from tests.lightning import WeightAveraging as TheirAveraging

DECAY = 0.8


def deciding(base: Any, decide: Any) -> Any:
    """Return a subclass that overrides ``should_update`` and records the calls."""

    class Deciding(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.moments: list[tuple[int | None, int | None]] = []

        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            self.moments.append((step_idx, epoch_idx))
            return decide(step_idx, epoch_idx)

    return Deciding


DECISIONS = {
    "late": lambda step, epoch: step is not None and step >= 5,
    "third": lambda step, epoch: step is not None and step % 3 == 0,
    "epoch": lambda step, epoch: epoch is not None,
    "both": lambda step, epoch: (step is not None and step % 4 == 1) or (epoch is not None and epoch >= 1),
    "never": lambda step, epoch: False,
}


@pytest.mark.filterwarnings("ignore:.* has no effect")
@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("batches", [1, 3])
def test_the_average_and_the_moments_are_those_of_lightning(decision: str, batches: int) -> None:
    ends, asked = [], []
    for base in (TheirEMA, EMAWeightAveraging):
        model, callback = Model(), deciding(base, DECISIONS[decision])(decay=DECAY)
        fit(model, [callback], max_epochs=3, accumulate_grad_batches=batches)
        if decision != "never":  # which overwrites the model with its first weights, in Lightning
            ends.append(snapshot(model))
        asked.append(callback.moments)
    assert asked[0] == asked[1]
    assert asked[0]
    if ends:
        assert_close(*ends)


class Both(Model):
    """A model with two optimizers that step at different batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for index, optimizer in enumerate(self.optimizers()):
            if batch_idx % (index + 1) == 0:
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), 0.05), torch.optim.SGD(self.net[2].parameters(), 0.02)]


def test_all_optimizers_are_taken_in_together() -> None:
    ends, asked = [], []
    for base in (TheirEMA, EMAWeightAveraging):
        model, callback = Both(), deciding(base, DECISIONS["late"])(decay=DECAY)
        fit(model, [callback])
        ends.append(snapshot(model))
        asked.append(callback.moments)
    assert asked[0] == asked[1]
    assert_close(*ends)


@pytest.mark.parametrize("average", [EMA(DECAY, warmup=None), EMA(0.9), SWA(), LAWA(2)], ids=repr)
def test_each_update_counts_as_one_step(average: Any) -> None:
    model = Model()
    fit(model, [deciding(WeightAveraging, DECISIONS["third"])(average)])
    taken = model.trajectory[::3]
    if isinstance(average, SWA | LAWA):
        wanted = mean(taken if isinstance(average, SWA) else taken[-2:])
    elif average.warmup is None:
        wanted = ema(taken, DECAY)
    else:
        wanted = {name: value.double() for name, value in taken[0].items()}
        for t, state in enumerate(taken[1:], start=1):
            share = 1.0 - average.decay_at(t)
            wanted = {name: value + share * (state[name] - value) for name, value in wanted.items()}
    assert_close(snapshot(model), wanted)


def test_a_mean_over_epochs_as_lightnings_base_class_has_it() -> None:
    ends = []
    for callback in (
        deciding(TheirAveraging, DECISIONS["epoch"])(),
        deciding(WeightAveraging, DECISIONS["epoch"])(SWA(), buffers="average"),
    ):
        model = Model()
        fit(model, [callback], max_epochs=3)
        assert_close(snapshot(model), mean(model.trajectory[7::8]))
        ends.append(callback.moments)
    assert ends[0] == ends[1]


class Saves(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("decision", ["late", "third", "both"])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_resumed_run_decides_as_the_whole_one(tmp_path: Path, decision: str, batches: int, first: str) -> None:
    def run(base: Any, *callbacks: Callback, **changes: Any) -> tuple[dict[str, Tensor], list[Any]]:
        model, callback = Model(), deciding(base, DECISIONS[decision])(decay=DECAY)
        fit(model, [callback, *callbacks], max_epochs=4, accumulate_grad_batches=batches, **changes)
        return snapshot(model), callback.moments

    whole, asked = run(EMAWeightAveraging if first == "ours" else TheirEMA, Saves(tmp_path / "one.ckpt"))
    resumed, again = run(EMAWeightAveraging, ckpt=tmp_path / "one.ckpt")
    assert again == asked[-len(again) :]
    if first == "ours":
        assert_equal(resumed, whole)
    else:
        assert_close(resumed, whole)


def test_a_function_that_is_set_on_the_callback_decides_too() -> None:
    model, callback = Model(), EMAWeightAveraging(decay=DECAY)
    callback.should_update = lambda step_idx=None, epoch_idx=None: step_idx == 3  # type: ignore[method-assign]
    fit(model, [callback])
    assert_close(snapshot(model), model.trajectory[3])


def test_an_override_may_ask_what_the_arguments_say() -> None:
    class Even(EMAWeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return super().should_update(step_idx, epoch_idx) and self.steps[0] > 9

    model = Model()
    fit(model, [Even(decay=DECAY, update_every_n_steps=2, update_starting_at_epoch=1)])
    assert_close(snapshot(model), ema(model.trajectory[10::2], DECAY))


@pytest.mark.parametrize(
    ("callback", "steps", "epochs"),
    [
        (EMAWeightAveraging(), [0, 1, 2, 3, 4, 5, 6, 7, 8], []),
        (EMAWeightAveraging(update_every_n_steps=3, update_starting_at_step=2), [3, 6], []),
        (WeightAveraging(SWA(), start=3, every=2), [3, 5, 7], []),
        (WeightAveraging(SWA(), every="epoch"), [], [0, 1]),
    ],
    ids=repr,
)
def test_should_update_can_be_called_outside_of_a_run(callback: Any, steps: list[int], epochs: list[int]) -> None:
    assert [step for step in range(9) if callback.should_update(step_idx=step)] == steps
    assert [epoch for epoch in range(2) if callback.should_update(epoch_idx=epoch)] == epochs
    assert callback.should_update() is False


def test_an_overridden_average_is_validated_and_its_statistics_are_estimated() -> None:
    model = Model(make=norm_net)
    fit(model, [deciding(WeightAveraging, DECISIONS["third"])(SWA())])
    assert_equal(snapshot(model), model.validated[-1])
    names = [name for name, _ in model.named_parameters()]
    assert_close(snapshot(model), mean(model.trajectory[::3]), names)
