"""An L2 penalty on weights that the optimizer decays too gets one warning at the start."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lightning_optim import L1, L2, ElasticNet, ProximalL1, WeightRegularization
from tests.lightning import BoringModel, Trainer


class Decayed(BoringModel):
    """Train with a weight decay."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], decay: float, on: str = "") -> None:
        super().__init__()
        self.kind, self.decay, self.on = optimizer, decay, on

    def configure_optimizers(self) -> Any:
        decayed = [p for name, p in self.named_parameters() if name.endswith(self.on)]
        others = [p for name, p in self.named_parameters() if not name.endswith(self.on)]
        groups = [{"params": decayed, "weight_decay": self.decay}, {"params": others, "weight_decay": 0.0}]
        return self.kind(groups, lr=0.1)


def fit(terms: Any, model: Decayed, **arguments: Any) -> list[str]:
    defaults: dict[str, Any] = {"max_steps": 2, "logger": False, "enable_checkpointing": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    trainer = Trainer(callbacks=[WeightRegularization(terms)], accelerator="cpu", **{**defaults, **arguments})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model)
    return [str(one.message) for one in caught if "lightning_optim" in one.filename]


@pytest.mark.parametrize("terms", [L2(1e-3), [L1(1e-3), L2(1e-3)], ElasticNet(1e-3, 1e-3)], ids=repr)
def test_two_decays_are_told_once(terms: Any) -> None:
    told = fit(terms, Decayed(torch.optim.AdamW, 0.01))
    assert len(told) == 1 and told[0].startswith("AdamW(weight_decay=0.01) shrinks 1 tensor that"), told
    assert "pass `weight_decay=0.0` to AdamW" in told[0]


@pytest.mark.parametrize(
    ("terms", "model"),
    [
        (L1(1e-3), Decayed(torch.optim.AdamW, 0.01)),  # an elastic net
        (ProximalL1(1e-3), Decayed(torch.optim.AdamW, 0.01)),
        (ElasticNet(1e-3, 0.0), Decayed(torch.optim.AdamW, 0.01)),
        (L2(0.0), Decayed(torch.optim.AdamW, 0.01)),
        (L2(1e-3), Decayed(torch.optim.SGD, 0.0)),
        (L2(1e-3), Decayed(torch.optim.SGD, 0.01, on="bias")),  # other weights
        (L2(1e-3, exclude="*weight", on="*"), Decayed(torch.optim.SGD, 0.01, on="weight")),
    ],
)
def test_one_decay_is_not_told(terms: Any, model: Decayed) -> None:
    assert not fit(terms, model)


def test_a_fast_run_is_not_told() -> None:
    assert not fit(L2(1e-3), Decayed(torch.optim.AdamW, 0.01), fast_dev_run=True)
