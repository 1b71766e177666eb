"""Resume a killed run as if it had not been killed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_optim.resume import rank_state
from lightning_optim.resume.first_run import why_inexact
from lightning_optim.resume.loop_progress import Resume
from lightning_optim.resume.unsaved_buffers import Buffers
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.callback_state import from_each_rank
from lightning_optim.runtime.lightning import LightningModule, Trainer, rank_zero_warn
from lightning_optim.runtime.lightning.loops import is_resuming
from lightning_optim.runtime.lightning.modules import running_hook
from lightning_optim.runtime.logged_values import logged_values, metric_updates


class ExactResume(OptimCallback):
    r"""Resume a killed run as if it had not been killed, bit for bit.

    Lightning's checkpoints hold weights, optimizers, schedules and counters. They do not hold the random state, so a
    resumed run draws other dropout masks and another order of the data; and a validation that was due at the batch at
    whose end the checkpoint was written never runs. With this callback a checkpoint also holds, for every rank,

    * the state of the random generators of torch (CPU and CUDA), Python and NumPy, and of those that loaders and
      samplers own;
    * the positions of training loaders that have ``state_dict`` and ``load_state_dict``. Lightning saves rank 0's, and
      does not load them at an epoch's end, nor if ``configure_optimizers`` used ``trainer.estimated_stepping_batches``;
    * the values that ``self.log(…, on_epoch=True)`` and torchmetrics have gathered in the epoch, and those that
      callbacks monitor;
    * buffers in which ranks differ, such as the statistics of BatchNorm under FSDP2: Lightning saves one rank's;
    * non-persistent buffers that have changed since the fit started. Other attributes of the module are in no
      checkpoint, unless its ``on_save_checkpoint`` puts them there;

    and the resumed run first does what the killed one was about to do when it had written the checkpoint: log the
    batch, validate, step a ``ReduceLROnPlateau``, end the epoch. If the checkpoint was written in a validation, that
    validation runs again from its beginning.

    This holds for checkpoints that are written in ``on_train_batch_end``, in a validation, in ``on_train_epoch_end`` or
    between these, by a ``ModelCheckpoint``, on SIGTERM or with ``trainer.save_checkpoint``, for epochs and for
    ``max_steps``; on one device, with DDP and with FSDP2. Resume with the same arguments. With a plain ``DataLoader``
    write checkpoints at the end of epochs, as ``ModelCheckpoint`` does by default::

        trainer = Trainer(max_epochs=50, callbacks=[ExactResume(), ModelCheckpoint(save_last=True)])
        trainer.fit(model, train_loader, val_loader, ckpt_path="last")

    The first run warns at its start if a ``ModelCheckpoint`` will write in the middle of epochs and a training loader
    cannot go on from there. A resumed run warns once of all that is not exact, with what to do instead:

    * A checkpoint from the middle of an epoch with a loader that does not save its position. Use torchdata's
      ``StatefulDataLoader``, or resume from an epoch's end, where a plain ``DataLoader(shuffle=True)`` is exact.
    * A checkpoint from the middle of an epoch with a loader that has no length: Lightning fetches one batch ahead.
    * Random numbers drawn in worker processes, from the middle of an epoch or with ``persistent_workers=True``.
    * A checkpoint written while a window of ``Trainer(accumulate_grad_batches=…)`` was open: use
      ``GradientAccumulation``, which saves the window. A checkpoint written inside a training batch.
    * Another number of processes than the one that wrote the checkpoint, or one that was written without this callback.

    Three things are not restored. A hook is not called twice: if a callback writes a checkpoint in
    ``on_train_batch_end``, the module's own hook, which comes later, is not called for that batch.
    ``trainer.should_stop`` is not in the checkpoint, since the callback that stops decides anew: more patience on
    resume must be possible. Intervals by the clock, and with more than two processes the order in which DDP's first
    all-reduce sums, can differ.

    Args:
        name: Tells several of these apart in checkpoints.
        summary: See :class:`OptimCallback`.

    Example::

        >>> import tempfile
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Shuffled:
        ...     '''Batches in random order; the state is the batches of the epoch that are left.'''
        ...     def __init__(self, data, size):
        ...         self.data, self.size, self.left = data, size, []
        ...     def __len__(self):
        ...         return len(self.data) // self.size
        ...     def __iter__(self):
        ...         self.left = self.left or list(torch.randperm(len(self.data)).split(self.size))
        ...         while self.left:
        ...             yield self.data[self.left.pop(0)]
        ...     def state_dict(self):
        ...         return {"left": list(self.left)}
        ...     def load_state_dict(self, state):
        ...         self.left = list(state["left"])
        >>> folder, data = tempfile.mkdtemp(), torch.randn(32, 32)
        >>> def train(ckpt_path=None):
        ...     saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
        ...     trainer = Trainer(max_epochs=2, callbacks=[ExactResume(summary=False), saver], logger=False,
        ...                       enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)
        ...     model = BoringModel()
        ...     trainer.fit(model, Shuffled(data, size=4), ckpt_path=ckpt_path)
        ...     return model.layer.weight
        >>> whole = train()
        >>> torch.equal(train(f"{folder}/step=3.ckpt"), whole)  # from the middle of the first epoch of eight batches
        True
    """

    gathers_ranks = True
    warns_at_start: bool = True
    """False if the caller checks for itself that a checkpoint is exact, as ``fit_members`` does."""
    _trainer: weakref.ref[Trainer] | None = None
    _loaded: dict[str, Any] | None = None
    _before_validation: tuple[dict[str, Any], dict[str, int]] | None = None
    _buffers: Buffers | None = None

    def describe_run(self) -> str:
        return "exact resume from checkpoints"

    # ---- state -------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        self._loaded = self._before_validation = self._buffers = None

    def extra_state(self) -> dict[str, Any]:
        """Return every rank's state, gathered: Lightning stores what rank 0 returns."""
        if self._loaded is not None:
            return self._loaded
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None or self._stage != "fit":
            return {}
        validation = None
        if trainer.validating:
            # The running hook tells it. A hook of this callback may come later than that of the callback that writes.
            validation = "done" if running_hook(trainer.lightning_module) == "on_validation_end" else "running"
        ranks = from_each_rank(self._rank_state(trainer, validation), trainer.world_size)
        unsaved = {} if self._buffers is None else self._buffers.unsaved()
        return {"validation": validation, "ranks": ranks, "buffers": unsaved}

    def rank_state(self) -> dict[str, Tensor]:
        held = {} if self._loaded is not None or self._buffers is None else self._buffers.of_rank()
        return {f"buffers/{name}": buffer for name, buffer in held.items()}

    def _rank_state(self, trainer: Trainer, validation: str | None) -> dict[str, Any]:
        moment, touched = rank_state.moment(trainer), set()
        if validation is not None and self._before_validation is not None:
            # Metrics that this validation has updated are left out: if it runs again, they start without its values,
            # and if it is done, they are reset after its last hook.
            before, updates = self._before_validation
            counts = metric_updates(trainer)
            touched = {name for name, count in counts.items() if count != updates.get(name)}
            moment = before if validation == "running" else moment
        loaders, logged = rank_state.loader_state(trainer), logged_values(trainer, touched)
        return {"moment": moment, "loaders": loaders, "logged": logged}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._loaded = extra if extra.get("ranks") else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the buffers in which ranks differ. Nothing else is sharded: asking for it again would gather it."""
        self._save_ranks(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._stage == "fit" and checkpoint.get("global_step"):
            # Lightning runs the sanity check again when it resumes at an epoch's end; the run that went on did not.
            self.session.patch(trainer, "num_sanity_val_steps", 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_trainer": None, "_buffers": None}

    # ---- life --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            # The checkpoint of an exception is written when the session is closed already.
            self._trainer = weakref.ref(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        fit_loop, val_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
        self._buffers = Buffers(trainer)
        # When the fit loop's `run` is called, all state is restored and no epoch has begun: there is no hook for that.
        run, validate = fit_loop.run, val_loop.run
        self.session.patch(fit_loop, "run", lambda: self._run(trainer, run))
        self.session.patch(val_loop, "run", lambda: self._validate(trainer, validate))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        is_first = trainer.global_step == 0  # a resumed run says of itself what is not exact
        if self.warns_at_start and is_first and not trainer.fast_dev_run and (why := why_inexact(trainer)):
            rank_zero_warn(why)

    def _run(self, trainer: Trainer, run: Callable[[], None]) -> None:
        # The learning-rate finder runs the loop too, without the callbacks.
        if not is_resuming(trainer) or self not in trainer.callbacks:
            return run()
        saved, self._loaded = self._loaded, None
        resume = Resume(trainer, saved)
        resume.prepare(self.session.patch)
        resume.run(run)

    def _validate(self, trainer: Trainer, validate: Callable[[], Any]) -> Any:
        # Before the loader's iterator is made, which draws a random number.
        self._before_validation = rank_state.moment(trainer), metric_updates(trainer)
        return validate()
