"""Run small fits whose validations log scripted scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tests.lightning import Callback, LightningModule, Trainer

BATCHES = 4


def data(seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * BATCHES, 3, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8)


class Scripted(LightningModule):
    """Train a regression with momentum; each validation logs the next score of each metric, and stores the weights.

    Args:
        scores: The scores of the validations for each metric; a list is for ``val_loss``.
    """

    def __init__(self, scores: dict[str, list[float]] | list[float] = ()) -> None:  # type: ignore[assignment]
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.scores = scores if isinstance(scores, dict) else {"val_loss": scores}
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        index = self.trainer.fit_loop.epoch_loop.batch_progress.total.completed // BATCHES - 1
        for name, scores in self.scores.items():
            value = scores[index] if len(scores) else functional.mse_loss(self.net(batch[0]), batch[1])
            self.log(name, torch.as_tensor(value))

    def on_validation_end(self) -> None:
        self.seen.append(weights(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 5,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))


def fit(
    module: LightningModule, *callbacks: Callback, ckpt_path: Any = None, validates: bool = True, **options: Any
) -> Trainer:
    """Train the module with these callbacks, with or without a validation loader."""
    running = trainer(*callbacks, **options)
    running.fit(module, data(), data(seed=1) if validates else None, ckpt_path=ckpt_path)
    return running


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and persistent buffers."""
    return {name: tensor.detach().clone() for name, tensor in nn.Module.state_dict(module).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two sets of weights are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def after(epoch: int, act: Callable[[Any], None]) -> Callback:
    """Make a callback that changes the module when an epoch begins."""

    class Acting(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == epoch:
                act(pl_module)

    return Acting()
