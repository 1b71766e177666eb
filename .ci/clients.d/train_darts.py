"""Train darts' TiDE model on a noisy sine that the package generates."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning
import torch
from client import Client, Fit
from darts import TimeSeries
from darts.models import TiDEModel
from darts.utils.timeseries_generation import gaussian_timeseries, sine_timeseries
from torch import Tensor

import lightning_optim as lo

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}


class Darts(Client):
    name = "darts"
    lightning = pytorch_lightning
    dropout = "encoders"
    missing: ClassVar[dict[str, str]] = {"`RegularizationMixin`": "darts makes the LightningModule itself"}
    partly: ClassVar[dict[str, str]] = {
        "`fit_members`, `Ensemble`, `cost_benefit`": "darts fits the members, since it makes the modules itself"
    }

    def __init__(self) -> None:
        np.random.seed(1)
        wave = sine_timeseries(length=84, value_frequency=1 / 12) + 0.1 * gaussian_timeseries(length=84)
        self.train_set, self.val_set = (part.astype(np.float32) for part in wave.split_before(55))
        self.folder = tempfile.TemporaryDirectory()

    def model(self, callbacks: list[Any], epochs: int, seed: int, **options: Any) -> TiDEModel:
        return TiDEModel(
            input_chunk_length=12,
            output_chunk_length=4,
            hidden_size=8,
            decoder_output_dim=4,
            dropout=0.1,
            use_layer_norm=True,
            n_epochs=epochs,
            batch_size=10,
            optimizer_kwargs={"lr": 1e-2},
            random_state=seed,
            model_name="tide",
            work_dir=self.folder.name,
            save_checkpoints=True,
            force_reset=True,
            pl_trainer_kwargs={"callbacks": callbacks, **QUIET, **options},
        )

    def train(self, callbacks: list[Any], epochs: int, resume: Path | None, options: dict[str, Any]) -> Fit:
        if resume is None:
            model = self.model(callbacks, epochs, self.run_seed, **options)
        else:
            # The earlier fit has written the rest of the model, with its callbacks, beside darts' own checkpoints.
            shutil.copy(resume, Path(self.folder.name) / "tide" / "checkpoints")
            model = TiDEModel.load_from_checkpoint("tide", self.folder.name, file_name=resume.name, trusted=True)
        model.fit(self.train_set, val_series=self.val_set, epochs=epochs)
        self.fitted, self.datamodule = model, model.trainer.datamodule

        def reload(folder: Path) -> dict[str, Tensor]:
            model.save(str(folder / "model.pt"))
            model.save(str(folder / "clean.pt"), clean=True)
            loaded = {
                "save and load": TiDEModel.load(str(folder / "model.pt"), trusted=True),
                "save(clean=True) and load": TiDEModel.load(
                    str(folder / "clean.pt"), pl_trainer_kwargs={"accelerator": "cpu"}
                ),
            }
            return {way: self._predict(one) for way, one in loaded.items()}

        return Fit(model.model, lambda: self._predict(model), reload)

    def _predict(self, model: TiDEModel) -> Tensor:
        predicted: TimeSeries = model.predict(4, series=self.train_set, verbose=False)
        return torch.from_numpy(predicted.values())

    def other_fits(self, callbacks: Callable[[], list[Any]]) -> dict[str, Tensor]:
        tuned = self.model(callbacks(), 2, 1)
        tuned.lr_find(self.train_set, val_series=self.val_set, num_training=4)
        tuned.fit(self.train_set, val_series=self.val_set)
        # Pandas 3 and this darts disagree about dates in a backtest, so the series is numbered.
        series = TimeSeries.from_values(self.train_set.values())
        backtest = self.model(callbacks(), 2, 1).historical_forecasts(
            series, start=40, forecast_horizon=4, stride=8, retrain=True, verbose=False
        )
        return {
            "lr_find": self._predict(tuned),
            "historical_forecasts": torch.from_numpy(backtest.values()),
        }

    def member(self, index: int, base: tuple[type, ...] = ()) -> Any:
        raise NotImplementedError("darts makes its LightningModules in `fit`")

    def members(self, folder: Path) -> list[Any]:
        models = [self.model([lo.WeightAveraging(lo.EMA(0.8))], 2, seed) for seed in range(3)]
        for model in models:
            model.fit(self.train_set, val_series=self.val_set)
        self.fitted, self.datamodule = models[0], models[0].trainer.datamodule
        return [model.model for model in models]

    def predict(self, module: Any) -> Tensor:
        self.fitted.model = module
        return self._predict(self.fitted)

    def trainer(self, **options: Any) -> Any:
        return pytorch_lightning.Trainer(logger=False, enable_checkpointing=False, **QUIET, **options)

    def data(self) -> tuple[Any, Any]:
        return None, self.datamodule


CLIENT = Darts
