"""A metric of the raw weights, `averaging/raw/…`, does not choose the averaged weights that are restored."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_optim import EMA, AnyOf, EarlyStopping, NonFinite, Plateau, WeightAveraging
from lightning_optim.runtime.lightning import MisconfigurationException
from tests.stopping.scripted_fits import Scripted, fit

RAW = "averaging/raw/val_loss"


@pytest.mark.parametrize(
    "arguments",
    [{"monitor": RAW}, {"monitor": "val_loss", "best_by": [RAW]}, {"monitor": AnyOf([NonFinite(RAW), Plateau(RAW)])}],
    ids=str,
)
def test_it_is_refused(arguments: dict[str, Any]) -> None:
    said = r"by 'averaging/raw/val_loss', a metric of the raw ones: monitor 'val_loss'.*or `restore_best=False`"
    for order in (1, -1):
        callbacks = [WeightAveraging(EMA(0.9), compare=True), EarlyStopping(**arguments)][::order]
        with pytest.raises(MisconfigurationException, match=said):
            fit(Scripted(), *callbacks)


@pytest.mark.parametrize("options", [{"restore_best": False}, {"best_by": "val_loss"}], ids=str)
def test_it_may_stop(options: dict[str, Any]) -> None:
    stop = EarlyStopping(RAW, strict=False, **options)
    fit(Scripted(), WeightAveraging(EMA(0.9), compare=True), stop)
    assert stop.history
