"""Average the best checkpoints of a ``ModelCheckpoint`` at the end of a fit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_optim.averaging.batchnorm.refresh import BatchNormRefresh, in_training
from lightning_optim.averaging.batchnorm.refresh_batches import check_arguments
from lightning_optim.averaging.checkpoints import reading
from lightning_optim.averaging.checkpoints.running_mean import RunningMean, StateDict
from lightning_optim.averaging.checkpoints.soup import greedy_mean
from lightning_optim.averaging.training.buffer_plan import BufferPlan, plan_buffers
from lightning_optim.base import module_tensors, shards
from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.runtime import callback_state
from lightning_optim.runtime.files.filesystems import filesystem_of
from lightning_optim.runtime.files.own_files import OwnFiles
from lightning_optim.runtime.files.saved_weights import load_weights_
from lightning_optim.runtime.files.sharded_reading import load_folder
from lightning_optim.runtime.files.unused_path import unused_path
from lightning_optim.runtime.lightning import (
    LightningModule,
    MisconfigurationException,
    ModelCheckpoint,
    Trainer,
    logger_connector,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_optim.runtime.lightning.loops import logger_step
from lightning_optim.runtime.lightning.strategies import finish_writing, writes_folders
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.raw_weights import RawWeights
from lightning_optim.runtime.validation import validate


class CheckpointAveraging(BatchNormRefresh):
    r"""Average the best checkpoints at the end of a fit, and end with the average if it is better than the best one.

    In ``on_train_end`` the weights of the ``top`` best checkpoints of a ``ModelCheckpoint`` are averaged in fp32,
    :math:`\frac1k \sum_i \theta_i`, and the average is validated on the metric that ``ModelCheckpoint`` monitors. The
    score is logged as ``averaging/<monitor>``, and the average is written beside the best checkpoint, as a weights-only
    checkpoint for ``load_from_checkpoint`` and ``ckpt_path=``. In ``on_fit_end`` the better of the average and the best
    checkpoint is written into the module, before any weights that other callbacks would restore. Until then the module
    holds its raw weights.

    Args:
        top: Number of checkpoints, an integer >= 2. Default 5. ``ModelCheckpoint`` must keep at least as many
            (``save_top_k``).
        greedy: If True, leave out checkpoints that make the average worse (:func:`greedy_soup`,
            `arXiv:2203.05482 <https://arxiv.org/abs/2203.05482>`_). It takes one validation for each checkpoint but the
            best, and keeps only the best if the loss rises between the best two.
        monitor: Monitored metric of the ``ModelCheckpoint`` to use, if there are several. Default: the first that
            monitors one.
        buffers: ``"refresh"`` (default) estimates the statistics of BatchNorm anew for each average, from training
            data. ``"average"`` averages those of the checkpoints.
        refresh_batches: Number of batches of a refresh, at most those of one epoch. Default 100; ``None``: all.
        refresh_loader: Loader of these batches. Default: the training data, through a separate iterator.
        name: Name that tells two callbacks of this class apart in checkpoints.
        summary: See :class:`OptimCallback`.

    Attributes:
        path: Path of the checkpoint with the average; empty before it is written.
        score: Value of the monitored metric for the average; ``None`` before it is known.
        kept: Paths of the checkpoints in the average, the best first.
        best_path: Path of the checkpoint with the weights that the fit ended with; empty before.

    Raises:
        ValueError: If an argument is not allowed.
        MisconfigurationException: In ``setup`` or before the first step: without a ``ModelCheckpoint`` that keeps as
            many checkpoints, in a run without validation, or if BatchNorm statistics cannot be estimated by
            ``training_step``.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> callbacks = [ModelCheckpoint(monitor="val_loss", save_top_k=3), CheckpointAveraging(top=3)]
        >>> trainer = Trainer(callbacks=callbacks, logger=False)

    Outside of a run, :func:`average_checkpoints` and :func:`greedy_soup` do the same with any checkpoints.
    """

    slot = Slot.STOP
    touches = frozenset({"weights"})
    final_rank = 0

    def __init__(
        self,
        top: int = 5,
        greedy: bool = False,
        monitor: str | None = None,
        buffers: Literal["refresh", "average"] = "refresh",
        refresh_batches: int | None = 100,
        refresh_loader: Iterable[Any] | None = None,
        name: str | None = None,
        summary: bool = True,
    ) -> None:
        super().__init__(name, summary)
        check_number("top", top, low=2, integer=True)
        if not isinstance(monitor, str | None):
            raise ValueError(f"`monitor` must be a metric's name or None, got {monitor!r}")
        check_choice("buffers", buffers, Literal["refresh", "average"])
        check_arguments(refresh_batches, refresh_loader)
        self.top, self.greedy, self.monitor, self.buffers = top, greedy, monitor, buffers
        self.refresh_batches, self.refresh_loader = refresh_batches, refresh_loader
        self.reset()

    @property
    def identity(self) -> dict[str, Any]:
        return {} if self.monitor is None else {"monitor": self.monitor}

    @property
    def stays(self) -> frozenset[str]:
        return frozenset({"refresh_loader"})

    def reset(self) -> None:
        self.path = self.best_path = ""
        self.score: float | None = None
        self.kept: list[str] = []
        self._ranked: list[str] = []  # the checkpoints with which the fit may end, the best first
        self._raw_weights = RawWeights()

    def describe_run(self) -> str:
        how = "greedy average" if self.greedy else "average"
        return f"{how} of the best {self.top} checkpoints at the end, kept if it is better than the best one"

    def report(self) -> str:
        if self.session.wrote_final is not self:
            return ""
        if self.best_path != self.path:
            return f"best checkpoint restored: {os.path.basename(self.best_path)}"
        return f"average of {len(self.kept)} checkpoints restored: {os.path.basename(self.path)}"

    # ---- life --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._model_checkpoint(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not trainer.enable_validation:
            raise MisconfigurationException(
                "CheckpointAveraging validates the average, and this run has no validation: add a `validation_step` and"
                " validation data, or average the checkpoints after the run with `average_checkpoints`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._raw_weights.resume_(pl_module)
        plan = self._buffer_plan(pl_module)
        self.try_before_first_step(trainer, pl_module, plan.layers)
        if any(norm.sharded for norm in plan.vectors):
            raise MisconfigurationException(
                "CheckpointAveraging estimates the vectors of spectral normalization anew for the average, and no rank"
                " holds the whole weight: train with DDP."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        checkpoint = self._model_checkpoint(trainer)
        sign = 1.0 if checkpoint.mode == "max" else -1.0
        scores = {path: float(score) for path, score in checkpoint.best_k_models.items()}
        best_first = sorted(scores, key=lambda path: -sign * scores[path])
        self._ranked = ranked = self._usable(trainer, best_first, needed=self.top)
        if not ranked:
            return
        self.best_path = ranked[0]
        if len(ranked) < 2:
            rank_zero_info("CheckpointAveraging: there is only one checkpoint, so nothing is averaged.")
            return
        with self.session.without_average(), _weights_restored(pl_module):
            mean, self.kept, score = self._mean(trainer, pl_module, checkpoint, {path: scores[path] for path in ranked})
            if score is None or len(self.kept) < 2:
                return
            self.score = score
            self._load_average_(trainer, pl_module, mean)
            path = unused_path(os.path.dirname(self.best_path), f"average-of-best-{len(self.kept)}")
            self.path = trainer.strategy.broadcast(path)
            trainer.save_checkpoint(self.path, weights_only=True)
        if sign * score > sign * scores[ranked[0]]:
            self.best_path = self.path
            self._ranked = [self.path, *ranked]

    def resume_ended(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._raw_weights.resume_(pl_module)
        self.on_train_end(trainer, pl_module)

    def write_final_(self, pl_module: LightningModule) -> bool:
        if not self.best_path:
            return False
        # Callbacks that come later may have removed checkpoints, such as the one of the average.
        self.best_path = next(iter(self._usable(self.session.trainer, self._ranked, needed=1)), "")
        if not self.best_path:
            return False
        self._raw_weights.keep_raw(pl_module)
        try:
            load_weights_(pl_module, self.best_path, weights_only=self.best_path not in self.session.own_files)
        except (OSError, ValueError) as error:
            rank_zero_warn(
                f"CheckpointAveraging leaves the module as it is, since it cannot read a checkpoint: {error}"
            )
            self.best_path = ""
            self._raw_weights.resume_(pl_module)
            return False
        return True

    def _usable(self, trainer: Trainer, paths: Iterable[str], needed: int) -> list[str]:
        """Return the first checkpoints that can be read, the same on all ranks; warn of those before that cannot.

        Args:
            trainer: The running Trainer.
            paths: The checkpoints, the best first.
            needed: Number of checkpoints to find. Those after them are not looked for, nor missed.
        """
        finish_writing(trainer.strategy)
        folders = writes_folders(trainer.strategy)
        usable: list[str] = []
        reasons: list[str] = []
        for path in paths:
            if len(usable) == needed:
                break
            if reason := _why_unusable(path, folders):
                reasons.append(f"{path} {reason}")
            else:
                usable.append(path)
        usable, reasons = trainer.strategy.broadcast((usable, reasons))
        if reasons:
            none_left = "" if usable else " None is left, and CheckpointAveraging changes no weights."
            rank_zero_warn(
                "CheckpointAveraging leaves out checkpoints that were saved in this run, and that something else has"
                f" removed or replaced since: {'; '.join(reasons)}.{none_left}"
            )
        return usable

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return self._raw_weights.extra_state()

    def rank_state(self) -> dict[str, Tensor]:
        return self._raw_weights.rank_state()

    def displaced(self) -> dict[str, Tensor]:
        return self._raw_weights.displaced

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._raw_weights.load_extra_state(extra)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        callback_state.leave_out(trainer.strategy, pl_module, self.state_key, ("raw",))

    def _model_checkpoint(self, trainer: Trainer) -> ModelCheckpoint:
        """Return the ``ModelCheckpoint`` whose checkpoints are averaged."""
        for callback in trainer.callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
                enough = callback.save_top_k == -1 or callback.save_top_k >= self.top
                if enough and self.monitor in (None, callback.monitor):
                    return callback
        wanted = self.monitor or "…"
        raise MisconfigurationException(
            f'CheckpointAveraging(top={self.top}) averages the checkpoints of a `ModelCheckpoint(monitor="{wanted}",'
            f" save_top_k={self.top})`, and no such callback keeps that many: add one to the callbacks. If a package"
            " adds one that monitors the same metric, Lightning wants yours to be of another class:"
            " `class BestFew(ModelCheckpoint): pass`."
        )

    def _buffer_plan(self, pl_module: LightningModule) -> BufferPlan:
        return plan_buffers(pl_module, self.buffers, self.buffers, type(self).__name__)

    # ---- the average -------------------------------------------------------------------------------------------------

    def _mean(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: ModelCheckpoint, scores: dict[str, float]
    ) -> tuple[StateDict, list[str], float | None]:
        """Return the average, the checkpoints in it, and its score; ``None`` as the score if there is no average."""
        failed: list[Exception] = []  # errors of the user's code, which are raised again

        def score(weights: StateDict) -> float:
            try:
                self._load_average_(trainer, pl_module, weights)
                metrics = validate(trainer)
            except Exception as error:
                failed.append(error)
                raise
            if checkpoint.monitor not in metrics:
                raise _NotLogged
            return float(metrics[checkpoint.monitor])

        try:
            read = self._reader(trainer, pl_module, best=next(iter(scores)))
            if self.greedy:
                soup = greedy_mean(list(scores.values()), list(scores), read, score, checkpoint.mode, barrier=0.1)
                return soup, soup.kept, self._log(trainer, checkpoint, soup.score)
            mean = RunningMean()
            for path in scores:
                mean.add(read(path), label=path)
            result = mean.result()
            return result, list(scores), self._log(trainer, checkpoint, score(result))
        except _NotLogged:
            rank_zero_warn(
                f"CheckpointAveraging ends with the best checkpoint: the validation of the average does not log"
                f" {checkpoint.monitor!r}, which chose the checkpoints. Monitor a metric that `validation_step` logs."
            )
        except (OSError, ValueError) as error:
            if error in failed:
                raise
            rank_zero_warn(f"CheckpointAveraging ends with the best checkpoint: {error}")
        return {}, [], None

    def _reader(self, trainer: Trainer, pl_module: LightningModule, best: str) -> Callable[[str], StateDict]:
        """Return a function that reads a checkpoint, with the best checkpoint's values of buffers without a mean."""
        read = _reader_of_checkpoints(trainer, pl_module, self.session.own_files)
        first, averaged = read(best), {id(source.tensor) for source in self._buffer_plan(pl_module).averaged}
        known = {name for name, tensor in module_tensors.named_tensors(pl_module).items() if id(tensor) in averaged}
        known |= dict(pl_module.named_parameters(remove_duplicate=False)).keys()
        plain = {module_tensors.plain_name(name) for name in known}
        same = {name: value for name, value in first.items() if module_tensors.plain_name(name) not in plain}
        return lambda path: {**(first if path == best else read(path)), **same}

    def _load_average_(self, trainer: Trainer, pl_module: LightningModule, weights: StateDict) -> None:
        """Load an average into the module, estimate its statistics there, and set these in ``weights`` too."""
        _write_(pl_module, weights)
        plan = self._buffer_plan(pl_module)
        for norm in plan.vectors:
            norm.estimate_()
        self.estimate_statistics_(trainer, pl_module, seed=0, layers=in_training(plan.layers))
        if plan.vectors or plan.layers:
            live = _shards(pl_module)
            buffers = {module_tensors.plain_name(name) for name, _ in pl_module.named_buffers()}
            estimated = {n: live[p] for n in weights if (p := module_tensors.plain_name(n)) in buffers and p in live}
            weights.update({name: value.clone() for name, value in estimated.items()})

    def _log(self, trainer: Trainer, checkpoint: ModelCheckpoint, score: float) -> float:
        name = f"averaging/{checkpoint.monitor}"
        logger_connector.show_to_callbacks(trainer, {name: torch.tensor(score)})
        for logger in trainer.loggers:
            logger.log_metrics({name: score}, step=logger_step(trainer))
        return score


def _why_unusable(path: str, folders: bool) -> str:
    """Return why a checkpoint cannot be read, to follow its path in a sentence; empty if it can.

    Args:
        path: Path of the checkpoint.
        folders: True if the strategy writes, and so reads, folders alone.
    """
    filesystem = filesystem_of(path)
    if not filesystem.exists(path):
        return "is not there"
    if filesystem.isdir(path):
        return "" if filesystem.exists(os.path.join(path, ".metadata")) else "is a folder now, and no checkpoint"
    return "is a file, and this strategy reads folders" if folders else ""


class _NotLogged(Exception):
    """Raised if the validation did not log the metric that chose the checkpoints."""


def _reader_of_checkpoints(trainer: Trainer, pl_module: LightningModule, own: OwnFiles) -> Callable[[str], StateDict]:
    """Return a function that reads a checkpoint: full tensors from a file, this rank's shards from a folder."""
    if not writes_folders(trainer.strategy):
        return lambda path: reading.weights_in(path, weights_only=path not in own, skip_objects=True)

    def read(path: str) -> StateDict:
        shards.reshard_(pl_module)
        live = {name: value for name, value in pl_module.state_dict().items() if isinstance(value, Tensor)}
        found = {name: torch.empty_like(value) for name, value in live.items()}
        load_folder({"state_dict": found}, path, weights_only=path not in own)
        return dict(zip(found, shards.local_shards(found.values()), strict=True))

    return read


def _shards(module: LightningModule) -> dict[str, Tensor]:
    """Return the module's tensors that can be written, by plain name; of sharded ones this rank's shard."""
    shards.reshard_(module)
    live = module_tensors.writable_tensors(module)
    return dict(zip(live, shards.local_shards(live.values()), strict=True))


def _write_(module: LightningModule, weights: StateDict) -> None:
    """Copy full tensors, or this rank's shards, into the module."""
    parts, whole = _shards(module), module_tensors.writable_tensors(module)
    for name, value in weights.items():
        plain = module_tensors.plain_name(name)
        if isinstance(value, Tensor) and plain in parts:
            shards.copy_(parts[plain] if parts[plain].shape == value.shape else whole[plain], value)


@contextlib.contextmanager
def _weights_restored(module: LightningModule) -> Iterator[None]:
    """Context manager: afterwards the module has its weights and buffers from before."""
    kept = {name: tensor.clone() for name, tensor in _shards(module).items()}
    try:
        yield
    finally:
        _write_(module, kept)
