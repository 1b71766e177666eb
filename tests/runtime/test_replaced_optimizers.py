"""Steps of optimizers that a user puts in the place of others during a fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import EMA, GradientClipping, GradientMonitor, OptimCallback, WeightAveraging
from tests.lightning import BoringModel, MisconfigurationException, Trainer

EPOCHS, BATCHES = 3, 4


class Replacing(BoringModel):
    """Use a new optimizer in each epoch."""

    def __init__(self, way: str, manual: bool) -> None:
        super().__init__()
        self.way, self.automatic_optimization = way, not manual

    def on_train_epoch_start(self) -> None:
        if self.way == "set up again":
            self.trainer.strategy.setup_optimizers(self.trainer)
        elif self.way == "assigned":
            self.trainer.optimizers = [torch.optim.Adam(self.parameters(), lr=0.01)]
        elif self.way == "more" and self.current_epoch == 1:
            self.trainer.optimizers = [*self.trainer.optimizers, torch.optim.SGD(self.parameters(), lr=0.01)]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        if not self.automatic_optimization:
            found: Any = self.optimizers()
            for optimizer in found if isinstance(found, list) else [found]:
                optimizer.zero_grad()
                self.manual_backward(loss, retain_graph=True)
                optimizer.step()
                loss = self.layer(batch).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Weights(OptimCallback):
    """Record the weights after each step."""

    def reset(self) -> None:
        self.seen: list[Tensor] = []

    def on_after_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(pl_module.layer.weight.detach().clone())


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("way", ["set up again", "assigned"])
def test_their_steps_are_counted(way: str, manual: bool) -> None:
    weights, average = Weights(), WeightAveraging(EMA(0.9, warmup=None), evaluate=False)
    callbacks = [weights, average, clipping := GradientClipping(1.0), GradientMonitor()]
    module = Replacing(way, manual)
    Trainer(max_epochs=EPOCHS, limit_train_batches=BATCHES, callbacks=list(callbacks), barebones=True).fit(module)
    assert [callback.steps for callback in callbacks] == [[EPOCHS * BATCHES]] * 4
    assert clipping.skipped == [0]
    wanted, *later = weights.seen
    for seen in later:
        wanted = 0.9 * wanted + 0.1 * seen
    with average.averaged_weights(module):
        torch.testing.assert_close(module.layer.weight.detach(), wanted)


def test_more_optimizers_than_before_are_refused() -> None:
    trainer = Trainer(max_epochs=2, limit_train_batches=2, callbacks=[GradientClipping(1.0)], barebones=True)
    with pytest.raises(
        MisconfigurationException, match=r"has 2 optimizers, and had 1 .*GradientClipping cannot follow.*place"
    ):
        trainer.fit(Replacing("more", manual=True))
