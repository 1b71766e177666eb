"""Train neuralforecast's NHITS on series that the package generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning
import torch
from client import Client, Fit
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS
from neuralforecast.tsdataset import TimeSeriesDataModule
from neuralforecast.utils import generate_series
from torch import Tensor

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
BATCHES = 4  # in an epoch


class Neuralforecast(Client):
    name = "neuralforecast"
    lightning = pytorch_lightning
    monitor = "ptl/val_loss"
    ensemble_monitor = "ptl/val_loss"
    dropout = "blocks.*"
    missing: ClassVar[dict[str, str]] = dict.fromkeys(
        ["`ExactResume()`", "`CheckpointAveraging(top=3)`, `EarlyStopping(dirpath=…)` in a resumed run"],
        "neuralforecast does not resume a fit",
    )

    def __init__(self) -> None:
        self.series = generate_series(n_series=8, freq="D", min_length=60, max_length=60, seed=1)

    def model(self, callbacks: list[Any], epochs: int, seed: int, kind: type = NHITS, **options: Any) -> NHITS:
        """Return a model. neuralforecast counts in steps, which are batches without accumulation."""
        return kind(
            h=4,
            input_size=8,
            max_steps=BATCHES * epochs,
            val_check_steps=BATCHES,
            batch_size=2,
            windows_batch_size=16,
            stack_types=["identity", "identity"],
            n_blocks=[1, 1],
            mlp_units=[[8, 8], [8, 8]],
            n_pool_kernel_size=[2, 1],
            n_freq_downsample=[2, 1],
            dropout_prob_theta=0.1,
            learning_rate=1e-2,
            random_seed=seed,
            callbacks=callbacks,
            **QUIET,
            **options,
        )

    def train(self, callbacks: list[Any], epochs: int, resume: Path | None, options: dict[str, Any]) -> Fit:
        checkpoints = any(isinstance(c, pytorch_lightning.callbacks.ModelCheckpoint) for c in callbacks)
        model = self.model(callbacks, epochs, self.run_seed, enable_checkpointing=checkpoints, **options)
        forecast = NeuralForecast(models=[model], freq="D")
        forecast.fit(self.series, val_size=8)
        self.fitted = forecast

        def predict(fitted: NeuralForecast = forecast) -> Tensor:
            return torch.tensor(fitted.predict()["NHITS"].to_numpy())

        def reload(folder: Path) -> dict[str, Tensor]:
            forecast.save(str(folder / "forecast"), overwrite=True)
            return {"save and load": predict(NeuralForecast.load(str(folder / "forecast")))}

        return Fit(forecast.models[0], predict, reload)

    def other_fits(self, callbacks: Callable[[], list[Any]]) -> dict[str, Tensor]:
        forecast = NeuralForecast(models=[self.model(callbacks(), 2, 1)], freq="D")
        found = forecast.cross_validation(self.series, n_windows=2, val_size=8, refit=True)
        return {"cross_validation": torch.tensor(found["NHITS"].to_numpy())}

    def member(self, index: int, base: tuple[type, ...] = ()) -> Any:
        kind = type("NHITS", (*base, NHITS), {}) if base else NHITS
        return self.prepare(self.model([], 1, index + 1, kind))

    def prepare(self, module: Any) -> Any:
        module.val_size, module.test_size = 8, 0  # as `NeuralForecast.fit` sets them
        return module

    def trainer(self, **options: Any) -> Any:
        return pytorch_lightning.Trainer(**{"max_epochs": 1, "enable_checkpointing": False, **QUIET, **options})

    def data(self) -> tuple[Any, Any]:
        return (TimeSeriesDataModule(self.fitted.dataset, batch_size=2, valid_batch_size=8),) * 2

    def predict(self, module: Any) -> Tensor:
        return torch.from_numpy(module.predict(self.fitted.dataset))


CLIENT = Neuralforecast
