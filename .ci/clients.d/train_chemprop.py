"""Train chemprop's message-passing network on small molecules; the target is the number of their heavy atoms."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch
import torch
from chemprop import data, models, nn
from client import Client, Fit
from torch import Tensor

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


class Chemprop(Client):
    name = "chemprop"
    lightning = lightning.pytorch
    dropout = "message_passing.*"
    ensemble_monitor = "val/rmse"  # `val_loss` is computed from layers, and not from `self(…)`
    missing: ClassVar[dict[str, str]] = {
        "the package's learning-rate finder, backtest or cross-validation": "chemprop has none"
    }
    warns: ClassVar[dict[str, str]] = dict.fromkeys(
        ["`fit_members`, `Ensemble`, `cost_benefit`", "`average_checkpoints`, `Ensemble.from_checkpoints`"],
        "`validation_step` also used layers of the first member",
    )

    def __init__(self) -> None:
        smiles = ["".join(parts) for parts in itertools.product("CNO", ["C", "CC", "C(C)C"], "CNO", ["C", "CO"])]
        points = [data.MoleculeDatapoint.from_smi(text, [len(text) + 0.3 * text.count("N")]) for text in smiles[:48]]
        self.train_set, self.val_set = data.MoleculeDataset(points[:32]), data.MoleculeDataset(points[32:])
        scaler = self.train_set.normalize_targets()
        self.val_set.normalize_targets(scaler)

    def data(self) -> tuple[Any, Any]:
        train = data.build_dataloader(self.train_set, batch_size=8)
        return train, data.build_dataloader(self.val_set, batch_size=8, shuffle=False)

    def member(self, index: int, base: tuple[type, ...] = ()) -> Any:
        model = type("Model", (*base, models.MPNN), {}) if base else models.MPNN
        passing = nn.BondMessagePassing(d_h=16, depth=2)
        return model(
            passing,
            nn.MeanAggregation(),
            nn.RegressionFFN(input_dim=16, hidden_dim=16),
            batch_norm=True,
            metrics=[nn.metrics.RMSE()],
            warmup_epochs=1,
            max_lr=1e-2,
        )

    def trainer(self, **options: Any) -> Any:
        return lightning.pytorch.Trainer(**{"max_epochs": 1, **QUIET, **options})

    def train(self, callbacks: list[Any], epochs: int, resume: Path | None, options: dict[str, Any]) -> Fit:
        trainer = self.fitted(callbacks, epochs, resume, options)
        model = trainer.lightning_module

        def reload(folder: Path) -> dict[str, Tensor]:
            trainer.save_checkpoint(folder / "model.ckpt")
            models.save_model(folder / "model.pt", model)
            loaded = {
                "MPNN.load_from_checkpoint": models.MPNN.load_from_checkpoint(folder / "model.ckpt"),
                "MPNN.load_from_file": models.MPNN.load_from_file(folder / "model.ckpt"),
                "save_model and load_model": models.load_model(folder / "model.pt"),
            }
            return {way: self.predict(one) for way, one in loaded.items()}

        def predict() -> Tensor:
            return torch.cat(trainer.predict(model, self.data()[1]))

        return Fit(model, predict, reload)

    def predict(self, module: Any) -> Tensor:
        return torch.cat(self.trainer().predict(module, self.data()[1]))


CLIENT = Chemprop
