"""What must be known of a third-party package to try a callback in it: how it trains, predicts and saves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

import lightning_optim as lo

Weights = dict[str, Tensor]


def weights_of(module: Any) -> Weights:
    """Return copies of the parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@dataclass
class Record:
    """Hold what a fit did, as seen from a callback that stands after all others.

    Attributes:
        start: The weights before the first step.
        weights: The weights after each optimizer step, at the end of the batch.
        grads: The gradients that each optimizer step used.
        lrs: The learning rate of each step.
        checks: For each validation the number of steps before it, the metrics, and the weights that it used.
        epoch_ends: Number of steps at the end of each epoch.
        metrics: The metrics at the end of the fit.
        rates: The rates of the module's dropout layers in each batch, by name.
    """

    start: Weights = field(default_factory=dict)
    weights: list[Weights] = field(default_factory=list)
    grads: list[Weights] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    checks: list[tuple[int, dict[str, float], Weights]] = field(default_factory=list)
    epoch_ends: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    rates: list[dict[str, float]] = field(default_factory=list)


class Recorder:
    """Keep a :class:`Record` of a fit.

    The latest fit is that of the class's ``trainer``, and its record ``latest``: packages fit with copies of callbacks.
    """

    latest: ClassVar[Record]
    trainer: ClassVar[Any]

    def __init__(self) -> None:
        self.record = Record()
        self.hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hooks": []}  # packages pickle their callbacks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.record = Recorder.latest = Record()
        Recorder.trainer = trainer
        self.record.start = weights_of(pl_module)
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}

        def note(optimizer: Any, *_: Any) -> None:
            used = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.record.grads.append({names[id(p)]: p.grad.clone() for p in used})
            self.record.lrs.append(optimizer.param_groups[0]["lr"])

        self.hooks = [optimizer.register_step_post_hook(note) for optimizer in trainer.optimizers]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if len(self.record.grads) > len(self.record.weights):
            self.record.weights.append(weights_of(pl_module))
        self.record.rates.append(dropout_rates(pl_module))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.record.epoch_ends.append(len(self.record.weights))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.record.checks.append((len(self.record.weights), metrics, weights_of(pl_module)))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.record.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def dropout_rates(module: Any) -> dict[str, float]:
    """Return the rates of a module's dropout layers, by name."""
    return {name: layer.p for name, layer in module.named_modules() if isinstance(layer, torch.nn.Dropout)}


def subclass(name: str, *bases: type) -> type:
    """Make a class under this name in this module, where pickle finds it: packages pickle their callbacks."""
    made: type = globals().setdefault(name, type(name, bases, {"__module__": __name__}))
    return made


@dataclass
class Fit:
    """Hold a model of the package that was fitted, and the package's own ways to use it.

    Attributes:
        module: The LightningModule.
        predict: Function that returns the package's predictions.
        reload: Function that saves the model in a folder by each way of the package, loads it, and returns the
            predictions of the loaded ones, by the name of the way.
        record: What the fit did.
        trainer: The Trainer that fitted it.
    """

    module: Any
    predict: Callable[[], Tensor]
    reload: Callable[[Path], dict[str, Tensor]]
    record: Record = field(default_factory=Record)
    trainer: Any = None

    def used(self, callback: Any) -> Any:
        """Return the callback that the fit used: this one, or the package's copy of it."""
        return next(other for other in self.trainer.callbacks if type(other) is type(callback))


class Client(ABC):
    """One third-party package. A subclass trains a small model of it, for some epochs of a few batches.

    Attributes:
        name: Name of the package, as `pip` installs it, and of its page in `docs/with/`.
        lightning: The package of Lightning that it imports.
        monitor: A metric that its validation logs.
        ensemble_monitor: One that depends on nothing but the call that an `Ensemble` combines.
        outputs: Kind of its outputs, for `Ensemble`.
        dropout: Pattern of modules that get dropout.
        refused: Rows that end with a refusal, with a pattern of its sentence.
        warns: Rows in which `lightning_optim` warns, with a pattern of the warning.
        missing: Rows for which the package has no way, and what it lacks.
        partly: Rows of which only a part is possible there, and why.
    """

    name: str
    lightning: ModuleType
    monitor: str = "val_loss"
    ensemble_monitor: str = "val_loss"
    outputs: str = "values"
    dropout: str
    refused: ClassVar[dict[str, str]] = {
        "`GradientClipping` beside the package's `gradient_clip_val`": "both clip: .* pass `gradient_clip_val=None`",
        "`GradientAccumulation` beside the package's `accumulate_grad_batches`": "both accumulate: .* pass `accumulate",
    }
    warns: ClassVar[dict[str, str]] = {}
    missing: ClassVar[dict[str, str]] = {}
    partly: ClassVar[dict[str, str]] = {}

    run_seed: int = 1  # the seed of the present fit, for packages that seed with an argument of the model

    @abstractmethod
    def train(self, callbacks: list[Any], epochs: int, resume: Path | None, options: dict[str, Any]) -> Fit:
        """Make a model, and fit it through the package.

        Args:
            callbacks: Callbacks for its Trainer.
            epochs: Number of epochs.
            resume: Checkpoint from which to go on.
            options: Further arguments of its Trainer.
        """

    def seed(self, seed: int) -> None:
        """Seed all random generators."""
        self.run_seed = seed
        self.lightning.seed_everything(seed, verbose=False)

    def fit(self, *callbacks: Any, epochs: int = 4, resume: Path | None = None, seed: int = 1, **options: Any) -> Fit:
        """Fit a model with callbacks, and record what happened."""
        self.seed(seed)
        recorder = subclass("RecordingCallback", Recorder, self.lightning.Callback)()
        fit = self.train([*callbacks, recorder], epochs, resume, options)
        fit.record, fit.trainer = Recorder.latest, Recorder.trainer
        return fit

    def fitted(self, callbacks: list[Any], epochs: int, resume: Path | None, options: dict[str, Any]) -> Any:
        """Fit a :meth:`member` with a :meth:`trainer`, where the package leaves both to its user; see :meth:`train`."""
        module, (train, validation) = self.member(0), self.data()
        checkpoints = any(isinstance(one, self.lightning.callbacks.ModelCheckpoint) for one in callbacks)
        settings = {"max_epochs": epochs, "callbacks": callbacks, "enable_checkpointing": checkpoints, **options}
        trainer = self.trainer(**settings)
        # Their checkpoints hold classes of the package, which torch refuses to load without `weights_only=False`.
        trainer.fit(module, train, validation, ckpt_path=resume, weights_only=False)
        return trainer

    def saver(self, folder: Path, **options: Any) -> Any:
        """Return a ``ModelCheckpoint`` that can stand beside those that a package adds.

        Lightning refuses two of one class that monitor the same metric; it allows a subclass.
        """
        return subclass("SecondCheckpoint", self.lightning.callbacks.ModelCheckpoint)(folder, **options)

    def other_fits(self, callbacks: Callable[[], list[Any]]) -> dict[str, Tensor]:
        """Fit in the package's other ways, each with new callbacks, and return predictions by the name of the way."""
        raise NotImplementedError

    # ---- for mixins and ensembles ------------------------------------------------------------------------------------

    @abstractmethod
    def member(self, index: int, base: tuple[type, ...] = ()) -> Any:
        """Return a new LightningModule that was not fitted, whose class also derives from ``base``."""

    @abstractmethod
    def trainer(self, **options: Any) -> Any:
        """Return a Trainer for :meth:`member`."""

    @abstractmethod
    def data(self) -> tuple[Any, Any]:
        """Return the data for ``trainer.fit`` and ``trainer.validate`` of :meth:`member`."""

    def members(self, folder: Path) -> list[Any]:
        """Return three LightningModules that were fitted with an EMA."""
        paths = lo.fit_members(
            self.member,
            3,
            lambda _: self.trainer(max_epochs=2, callbacks=[lo.WeightAveraging(lo.EMA(0.8))]),
            self.data()[0],
            dirpath=folder,
        )
        members = [self.member(index) for index in range(3)]
        for member, path in zip(members, paths, strict=True):
            member.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
        return members

    def prepare(self, module: Any) -> Any:
        """Return a module from a checkpoint, with attributes that the package sets in a fit and does not save."""
        return module

    @abstractmethod
    def predict(self, module: Any) -> Tensor:
        """Return what the package predicts with a module on the validation data, an `Ensemble` included."""
