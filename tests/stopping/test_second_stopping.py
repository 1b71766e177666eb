"""Lightning's `EarlyStopping` beside ours: told once if it monitors the same metric, right and silent with another."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lightning_optim import AnyOf, EarlyStopping, Plateau
from tests.lightning import callbacks as theirs
from tests.stopping.scripted_fits import Scripted, fit

SCORES = {"val_loss": [5.0, 4.0, 6.0, 6.0, 6.0, 6.0], "other": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
TOLD = r"monitors 'val_loss' too, and the run ends as soon as one of the two stops it: remove Lightning's"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "ours", [EarlyStopping("val_loss", name="ours"), EarlyStopping(AnyOf(Plateau("val_loss")))], ids=repr
)
def test_the_same_metric_is_told_once(ours: EarlyStopping, first: bool) -> None:
    both = [ours, theirs.EarlyStopping("val_loss", patience=1)]
    with pytest.warns(UserWarning, match=TOLD) as said:
        running = fit(Scripted(SCORES), *(both if first else both[::-1]))
    assert running.current_epoch == 3, "theirs has stopped it"
    assert len([one for one in said if "too, and the run" in str(one.message)]) == 1


def test_another_metric_is_a_second_rule() -> None:
    ours = EarlyStopping("val_loss", patience=4)
    module = Scripted(SCORES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        running = fit(module, ours, theirs.EarlyStopping("other", patience=2))
    assert running.current_epoch == 3 and ours.best_check == 1
    best: Any = module.seen[1]
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in best.items()), "the best is restored"
