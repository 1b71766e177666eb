"""Estimate the BatchNorm statistics of averaged weights during a fit, with calls of the module's training step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parameter import is_lazy

from lightning_optim.averaging.batchnorm.isolated_step import isolated
from lightning_optim.averaging.batchnorm.refresh_batches import all_agree, separate_batches
from lightning_optim.averaging.batchnorm.statistics import Write, collect, statistics_layers, write_
from lightning_optim.base.layer_classes import BatchNormBase
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import (
    LightningModule,
    MisconfigurationException,
    ModelParallelStrategy,
    Trainer,
)
from lightning_optim.runtime.lightning.data_loading import to_device, training_step_arguments
from lightning_optim.runtime.lightning.modules import takes_argument


class BatchNormRefresh(OptimCallback):
    """Base class of callbacks that estimate BatchNorm statistics for averaged weights.

    Attributes:
        refresh_batches: Number of batches of one estimate; ``None``: all.
        refresh_loader: Loader of these batches; ``None``: that of the training data.
    """

    refresh_batches: int | None
    refresh_loader: Iterable[Any] | None
    _batch_idx = 0  # index of the batch within an estimate

    def forward_batch(self, pl_module: LightningModule, batch: Any) -> Any:
        """Run the model on a training batch, to estimate the statistics of its BatchNorm layers.

        By default this calls the module's ``training_step`` and ignores the loss, since nothing else knows how a batch
        becomes inputs. It is the method of the module itself and not of DDP's wrapper, so that no reducer prepares for
        a backward pass. Override it with a forward pass where that is not possible, as under manual optimization, or
        costs too much. Its changes to the module are undone. It is called without gradients first, and with gradients
        if that fails.

        Args:
            pl_module: The module in eval mode, except that BatchNorm layers normalize by the batch.
            batch: A batch on the module's device, as ``training_step`` gets it.

        Example::

            class Averaging(WeightAveraging):
                def forward_batch(self, pl_module, batch):
                    return pl_module.generator(batch["noise"])
        """
        return pl_module.training_step(*training_step_arguments(pl_module, batch, self._batch_idx))

    def estimate_statistics_(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        seed: int,
        layers: Sequence[BatchNormBase] | None = None,
        write: Write | None = None,
    ) -> None:
        """Estimate the BatchNorm statistics of the weights that the module holds now, over all ranks.

        Args:
            trainer: The running Trainer.
            pl_module: Its module.
            seed: Seed of the random state during the estimate, so that a resumed run gets the same one.
            layers: The layers. Default: all in training mode, since a layer in eval mode is frozen.
            write: Function that gets each layer with its new mean and variance. Default: set them in the layer.
        """
        layers = in_training(statistics_layers(pl_module)) if layers is None else layers
        if layers:
            with self._calls(trainer, pl_module, self.refresh_batches, seed) as (batches, runs):
                moments, _ = collect(pl_module, batches, runs, layers)
                write_(layers, moments, data_group(trainer), write)

    def try_before_first_step(self, trainer: Trainer, pl_module: LightningModule, layers: list[BatchNormBase]) -> None:
        """Try an estimate on one batch before the first training step. Call this in ``on_train_start``.

        The trial runs right before the first ``training_step``, when the module's own hooks have prepared it, and not
        before a layer is in training mode and all lazy parameters have a shape. It leaves no trace: the run is bit for
        bit the run without it.

        Raises:
            MisconfigurationException: Before the first step, if the estimate cannot work.
        """
        if not layers:
            return
        loop: Any = trainer.fit_loop.epoch_loop
        loop = loop.automatic_optimization if pl_module.automatic_optimization else loop.manual_optimization
        run, lazy = loop.run, [parameter for parameter in pl_module.parameters() if is_lazy(parameter)]
        waiting = True

        def try_and_run(*args: Any, **kwargs: Any) -> Any:
            nonlocal waiting
            # During the steps of a learning-rate finder this callback is not among the Trainer's callbacks.
            if waiting and self in trainer.callbacks and not any(map(is_lazy, lazy)) and in_training(layers):
                waiting = False
                self._try_one_batch(trainer, pl_module, in_training(layers))
            lazy.clear()  # a parameter that the first step does not materialize is not used by an estimate either
            return run(*args, **kwargs)

        self.session.patch(loop, "run", try_and_run)

    def _try_one_batch(self, trainer: Trainer, pl_module: LightningModule, layers: list[BatchNormBase]) -> None:
        own = getattr(self.forward_batch, "__func__", None) is not BatchNormRefresh.forward_batch
        if not own and not pl_module.automatic_optimization:
            raise self._not_possible(pl_module, "under manual optimization that would take optimizer steps")
        if not own and takes_argument(pl_module, "training_step", "dataloader_iter", explicit=True):
            raise self._not_possible(pl_module, "its `dataloader_iter` would take batches from training")
        failed: Exception | None = None
        try:
            with self._calls(trainer, pl_module, 1, seed=0) as (batches, runs):
                collect(pl_module, batches, runs, layers)
        except Exception as error:
            failed = error
        if not all_agree(failed is None, data_group(trainer)):
            reason = "failed on another rank" if failed is None else f"{type(failed).__name__}: {failed}"
            raise self._not_possible(pl_module, f"a trial on one batch ended with: {reason}") from failed

    def _not_possible(self, pl_module: LightningModule, reason: str) -> MisconfigurationException:
        name, module = type(self).__name__, type(pl_module).__name__
        return MisconfigurationException(
            f"{name} estimates the BatchNorm statistics of averaged weights by calls of `{module}.training_step` in"
            f" eval mode, and {reason}. Override `{name}.forward_batch(pl_module, batch)` with a forward pass, pass"
            ' `refresh_loader=` with batches that can be used, or pass `buffers="average"`.'
        )

    @contextlib.contextmanager
    def _calls(
        self, trainer: Trainer, pl_module: LightningModule, count: int | None, seed: int
    ) -> Iterator[tuple[Iterator[Any], list[Callable[[Any], Any]]]]:
        """Context manager: yield batches, and two functions that call the module: without gradients, and with."""

        def run(batch: Any) -> None:
            moved = to_device(trainer, pl_module, batch)
            if moved is not None:  # Lightning skips a batch that is None
                with trainer.precision_plugin.train_step_context():
                    self.forward_batch(pl_module, moved)

        def counted(batches: Iterator[Any]) -> Iterator[Any]:
            for self._batch_idx, batch in enumerate(batches):
                yield batch

        batches = separate_batches(trainer, self.refresh_loader, count, seed, data_group(trainer))
        with batches as given, isolated(trainer, pl_module) as calls:

            def without_gradients(batch: Any) -> None:
                with torch.no_grad():
                    calls.call(run, batch)

            def with_gradients(batch: Any) -> None:
                with torch.enable_grad():
                    calls.call(run, batch)

            yield counted(given), [without_gradients, with_gradients]


def in_training(layers: Sequence[BatchNormBase]) -> list[BatchNormBase]:
    """Return the layers in training mode; the others are frozen."""
    return [layer for layer in layers if layer.training]


def data_group(trainer: Trainer) -> dist.ProcessGroup | None:
    """Return the process group of the ranks that train on different data; ``None`` for one process."""
    if not (dist.is_available() and dist.is_initialized()) or trainer.world_size == 1:
        return None
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh["data_parallel"]
        return mesh.get_group() if mesh.size() > 1 else None
    return dist.group.WORLD
