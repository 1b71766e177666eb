"""Give the tests the names of one of Lightning's two packages: all import them from here.

``LIGHTNING_OPTIM_PACKAGE=pytorch_lightning pytest …`` runs any test with ``pytorch_lightning``. A name is looked up
when a test imports it. Where the installed version lacks it, a test that uses it is skipped.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest

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
    module = importlib.import_module(f"{PACKAGE}.{_PLACE_OF[name]}".rstrip("."))
    return getattr(module, name) if hasattr(module, name) else _Lacking(name, (), {})


def has(name: str) -> bool:
    """Return True if the installed version has this name."""
    return not isinstance(__getattr__(name), _Lacking)


class _Lacking(type):
    """Metaclass of a class in the place of one that the version of Lightning lacks: its use skips the test."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        cls._skip()

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        cls._skip()

    def _skip(cls) -> None:
        pytest.skip(f"this version of {PACKAGE} has no {cls.__name__}")


def supported(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Return those of the options that a function takes in the installed version, such as ``weights_only``."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}
