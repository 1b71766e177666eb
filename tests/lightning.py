"""Give the tests the names of one of Lightning's two packages: all import them from here.

``LIGHTNING_OPTIM_PACKAGE=pytorch_lightning pytest …`` runs any test with ``pytorch_lightning``. A name is looked up
when a test imports it, since a version of Lightning may lack it.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

PACKAGE = os.environ.get("LIGHTNING_OPTIM_PACKAGE", "lightning.pytorch")
OTHER = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning.pytorch"}[PACKAGE]

_PLACES = {
    "": ("LightningDataModule", "LightningModule", "Trainer", "callbacks", "seed_everything"),
    "callbacks": (
        "BackboneFinetuning",
        "Callback",
        "Checkpoint",
        "EMAWeightAveraging",
        "EarlyStopping",
        "GradientAccumulationScheduler",
        "LearningRateFinder",
        "ModelCheckpoint",
        "ModelPruning",
        "OnExceptionCheckpoint",
        "StochasticWeightAveraging",
        "Timer",
        "WeightAveraging",
    ),
    "callbacks.early_stopping": ("EarlyStoppingReason",),
    "cli": ("LightningCLI",),
    "demos.boring_classes": ("BoringModel",),
    "loggers": ("Logger",),
    "loops.optimization.automatic": ("Closure",),
    "plugins": ("MixedPrecision",),
    "plugins.environments": ("LightningEnvironment",),
    "plugins.io": ("AsyncCheckpointIO", "TorchCheckpointIO"),
    "strategies": (
        "DDPStrategy",
        "DeepSpeedStrategy",
        "FSDPStrategy",
        "ModelParallelStrategy",
        "Strategy",
        "XLAStrategy",
        "model_parallel",
    ),
    "trainer.connectors": ("callback_connector",),
    "tuner": ("Tuner",),
    "tuner.lr_finder": ("_LRCallback",),
    "utilities": ("CombinedLoader",),
    "utilities.exceptions": ("MisconfigurationException", "SIGTERMException"),
    "utilities.seed": ("isolate_rng",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACE_OF:
        raise AttributeError(f"tests.lightning has no {name}: add it to its table")
    return getattr(importlib.import_module(f"{PACKAGE}.{_PLACE_OF[name]}".rstrip(".")), name)
