"""An average that cannot do in a run what its arguments say gets one warning, at the start where that is known."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import EMA, LAWA, SWA, StochasticWeightAveraging, WeightAveraging
from tests.lightning import BoringModel, Callback, Trainer


def fit(callback: Callback, *more: Callback, model: nn.Module | None = None, **arguments: Any) -> list[str]:
    """Fit; return our warnings."""
    defaults: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 1, "logger": False}
    defaults |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(callbacks=[callback, *more], accelerator="cpu", **{**defaults, **arguments})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model or BoringModel())
    return [str(one.message) for one in caught if "lightning_optim" in one.filename]


class Ends(BoringModel):
    """End training after the third batch."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.trainer.should_stop = self.trainer.global_step >= 3


def test_decays_above_the_warm_up_are_one_average_and_told() -> None:
    averaged = []
    for decay in (0.99, 0.9999):
        torch.manual_seed(0)
        average, model = WeightAveraging(EMA(decay)), BoringModel()
        told = fit(average, model=model)
        assert len(told) == 1, told
        assert f"The warm-up of EMA(decay={decay}) ends at a decay of 0.7846 after the 10 steps" in told[0]
        averaged.append(model.layer.weight.detach().clone())
    assert torch.equal(*averaged), "as the warning says"
    for told_way in (EMA(0.78), EMA(0.9999, warmup=None)):
        assert not fit(WeightAveraging(told_way)), "what the warning proposes gets none"


@pytest.mark.parametrize("average", [EMA(0.9999, warmup=None), EMA(0.5), EMA(half_life=1), SWA(), LAWA(3)], ids=repr)
def test_an_average_that_does_what_it_says_gets_no_warning(average: Any) -> None:
    assert not fit(WeightAveraging(average))


def test_the_length_of_the_run_counts_from_the_first_update() -> None:
    assert math.isclose(EMA(0.9).decay_at(9), 1 - 10 ** (-2 / 3))
    assert not fit(WeightAveraging(EMA(0.78)))
    told = fit(WeightAveraging(EMA(0.78), start=5))
    assert len(told) == 1 and "after the 5 steps" in told[0]


@pytest.mark.parametrize("arguments", [{"max_epochs": -1, "max_time": "00:00:00:01"}, {"fast_dev_run": True}])
def test_a_run_of_unknown_length_gets_no_warning(arguments: dict[str, Any]) -> None:
    assert not fit(WeightAveraging(EMA(0.9999)), **arguments)


@pytest.mark.parametrize(
    "average",
    [WeightAveraging(SWA(), start=10), WeightAveraging(SWA(), start=1.0), WeightAveraging(EMA(0.5), start=1000)],
    ids=repr,
)
def test_an_average_that_starts_after_the_end_is_told_at_the_start(average: WeightAveraging) -> None:
    told = fit(average)
    assert len(told) == 1 and f"{average.brief} has no effect: it starts after" in told[0]
    assert not fit(WeightAveraging(SWA(), start=9))


class Never(WeightAveraging):
    """Never update."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return False


@pytest.mark.parametrize(
    ("average", "model"),
    [
        (WeightAveraging(SWA(), start=8), Ends()),
        (StochasticWeightAveraging(swa_epoch_start=2), Ends()),
        (Never(SWA()), BoringModel()),
    ],
    ids=repr,
)
def test_an_average_that_was_never_updated_is_told_at_the_end(average: WeightAveraging, model: nn.Module) -> None:
    told = fit(average, model=model)
    assert len(told) == 1 and f"{average.brief} has no effect: it was not updated in" in told[0]
