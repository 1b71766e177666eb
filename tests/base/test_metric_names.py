"""Which values of a metric are better, by its name."""

from __future__ import annotations

import pytest

from lightning_optim.base.metric_names import mode_of

NOTHING = ["acc_var", "f1_variance", "val_dice", "attention_map_norm", "nll_gain", "loss_decrease", "error_free_rate"]
NOTHING += ["-loss", "val/-loss", "val_map", "val_ap", "loss_scale", "loss_weight", "acc_std", "explained_error"]


@pytest.mark.parametrize("name", NOTHING)
def test_a_name_that_does_not_tell(name: str) -> None:
    assert mode_of(name) is None


def test_a_name_that_tells() -> None:
    assert mode_of("val-loss") == mode_of("train/weighted_loss") == mode_of("loss") == "min"
    assert mode_of("val-acc") == mode_of("val_f1") == "max"
