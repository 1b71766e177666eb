"""Train pytorch-forecasting's temporal fusion transformer on the series that the package generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
from client import Client, Fit
from pytorch_forecasting import QuantileLoss, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data
from pytorch_forecasting.tuning import Tuner
from torch import Tensor

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


class PytorchForecasting(Client):
    name = "pytorch-forecasting"
    lightning = lightning.pytorch
    dropout = "static_context_enrichment"

    def __init__(self) -> None:
        data = generate_ar_data(n_series=4, timesteps=40, seed=1)
        data["series"] = data["series"].astype(str)
        self.train_set = TimeSeriesDataSet(
            data[data.time_idx < 32],
            time_idx="time_idx",
            target="value",
            group_ids=["series"],
            static_categoricals=["series"],
            time_varying_unknown_reals=["value"],
            max_encoder_length=8,
            max_prediction_length=2,
        )
        self.val_set = TimeSeriesDataSet.from_dataset(self.train_set, data, min_prediction_idx=32)

    def data(self) -> tuple[Any, Any]:
        np.random.seed(1)
        train = self.train_set.to_dataloader(train=True, batch_size=20)
        return train, self.val_set.to_dataloader(train=False, batch_size=20)

    def member(self, index: int, base: tuple[type, ...] = ()) -> Any:
        kind = type("Model", (*base, TemporalFusionTransformer), {}) if base else TemporalFusionTransformer
        return kind.from_dataset(
            self.train_set,
            hidden_size=8,
            attention_head_size=2,
            hidden_continuous_size=4,
            dropout=0.1,
            loss=QuantileLoss(),
            learning_rate=0.01,
            optimizer="adam",
            log_interval=-1,
        )

    def trainer(self, **options: Any) -> Any:
        return lightning.pytorch.Trainer(**{"max_epochs": 1, **QUIET, "log_every_n_steps": 1, **options})

    def train(self, callbacks: list[Any], epochs: int, resume: Path | None, options: dict[str, Any]) -> Fit:
        trainer = self.fitted(callbacks, epochs, resume, options)
        model = trainer.lightning_module

        def reload(folder: Path) -> dict[str, Tensor]:
            trainer.save_checkpoint(folder / "model.ckpt")
            loaded = TemporalFusionTransformer.load_from_checkpoint(folder / "model.ckpt")
            return {"load_from_checkpoint": self.predict(loaded)}

        return Fit(model, lambda: self.predict(model), reload)

    def other_fits(self, callbacks: Callable[[], list[Any]]) -> dict[str, Tensor]:
        model, (train, validation) = self.member(0), self.data()
        trainer = self.trainer(max_epochs=2, callbacks=callbacks())
        Tuner(trainer).lr_find(model, train, validation, num_training=8, update_attr=False)
        trainer.fit(model, train, validation)
        return {"lr_find": self.predict(model)}

    def predict(self, module: Any) -> Tensor:
        predicted: Tensor = module.predict(self.data()[1], mode="quantiles", trainer_kwargs=dict(QUIET))
        return predicted


CLIENT = PytorchForecasting
