"""A penalty on the outputs, compared with a reference loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim import GradientAccumulation, RegularizationMixin
from tests.lightning import LightningModule, Trainer

DATA = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


class Sparse(RegularizationMixin, LightningModule):
    strength = 0.5

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 2)

    def regularization(self, batch: Tensor, outputs: Tensor) -> Any:
        return self.strength * (outputs.abs().mean() + batch.mean())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        outputs = self.layer(batch)
        return outputs.square().mean() + self.regularization_loss(batch, outputs)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(DATA, batch_size=2)


def reference(strength: float) -> Tensor:
    layer = Sparse().layer
    for window in DATA.view(2, 2, 2, 3):
        loss = torch.zeros(())
        for batch in window:
            outputs = layer(batch)
            loss = loss + outputs.square().mean() + strength * (outputs.abs().mean() + batch.mean())
        gradients = torch.autograd.grad(loss / 2, list(layer.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    return layer.weight.detach()


def test_equals_the_reference_loop_under_accumulation() -> None:
    model = Sparse()
    trainer = Trainer(
        max_epochs=1,
        callbacks=[GradientAccumulation(2)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model)
    assert torch.allclose(model.layer.weight, reference(0.5), atol=1e-6)
    assert not torch.allclose(model.layer.weight, reference(0.0), atol=1e-3)
    logged = trainer.callback_metrics["regularization/loss"]
    assert logged.ndim == 0 and logged != 0 and not logged.requires_grad


@pytest.mark.parametrize("wrong", [torch.ones(2), 0.5])
def test_a_penalty_that_is_no_scalar_tensor_is_refused(wrong: Any) -> None:
    model = Sparse()
    model.regularization = lambda batch, outputs: wrong  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="scalar"):
        model.regularization_loss(None, None)


def test_a_missing_override_is_named() -> None:
    with pytest.raises(NotImplementedError, match="regularization"):
        RegularizationMixin().regularization_loss(None, None)
