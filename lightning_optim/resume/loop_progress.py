"""Bring Lightning's loops to the place where a checkpoint was written, so that they go on as that run did."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from lightning_optim.resume import rank_state
from lightning_optim.resume.exactness_checks import inexact_parts
from lightning_optim.resume.unsaved_buffers import set_buffers_
from lightning_optim.runtime.lightning import Trainer, data_loading, logger_connector, rank_zero_warn
from lightning_optim.runtime.lightning.loops import is_last_batch, skip_next_validation
from lightning_optim.runtime.logged_values import set_logged_values_


class Place(enum.Enum):
    """Place in the run at which a checkpoint was written."""

    BETWEEN_EPOCHS = enum.auto()
    EPOCH_END = enum.auto()  # in on_train_epoch_end
    BATCH_END = enum.auto()  # in on_train_batch_end
    VALIDATION = enum.auto()  # in a hook of a validation
    BETWEEN_BATCHES = enum.auto()
    INSIDE_BATCH = enum.auto()


class Resume:
    """Take a resumed run from the moment when all state is restored to its first batch.

    Args:
        trainer: The Trainer that is about to run its fit loop.
        saved: State of :class:`~lightning_optim.ExactResume` in the checkpoint; ``None`` if it has none.

    Attributes:
        known: True if the checkpoint was written with ``ExactResume``.
        place: The place at which it was written, by Lightning's counts and by ``validation``.
        validation: ``"running"`` or ``"done"`` if it was written in a validation.
        own: This rank's state; ``None`` if the checkpoint has none for this rank.
        buffers: This rank's buffers that differ from those of the module's ``state_dict``, or are not in it.
        within_epoch: True if it was written before the epoch's end.
        unfinished: True as long as the batch at which it was written has not ended.
        positions: Positions of the training loaders.
    """

    def __init__(self, trainer: Trainer, saved: dict[str, Any] | None) -> None:
        ranks = saved["ranks"] if saved is not None else []
        self.trainer = trainer
        self.known = saved is not None
        self.own: dict[str, Any] | None = ranks[trainer.global_rank] if len(ranks) == trainer.world_size else None
        self.buffers: dict[str, Any] = saved.get("buffers", {}) if saved is not None else {}
        self.validation: str | None = saved["validation"] if saved is not None else None
        self.place = self._find_place()
        self.within_epoch = self.place not in (Place.BETWEEN_EPOCHS, Place.EPOCH_END)
        self.unfinished = self.place in (Place.BATCH_END, Place.VALIDATION)
        self.positions: list[Any] = []
        self._writers = len(ranks)

    def _find_place(self) -> Place:
        fit_loop = self.trainer.fit_loop
        epoch, batch = fit_loop.epoch_progress.current, fit_loop.epoch_loop.batch_progress.current
        if epoch.processed > epoch.completed:
            return Place.EPOCH_END
        if epoch.started == epoch.processed:
            return Place.BETWEEN_EPOCHS
        if batch.processed > batch.completed:
            return Place.BATCH_END
        if batch.ready > batch.completed:
            return Place.INSIDE_BATCH
        return Place.BETWEEN_BATCHES if self.validation is None else Place.VALIDATION

    # ---- before the fit loop runs ------------------------------------------------------------------------------------

    def prepare(self, replace: Callable[[Any, str, Any], None]) -> None:
        """Correct the counters, load the loaders' positions, and install what the first epoch and batch need.

        Args:
            replace: Sets an attribute of an object for the length of the fit.
        """
        fit_loop, epoch_loop = self.trainer.fit_loop, self.trainer.fit_loop.epoch_loop
        self._load_positions()
        if self.place is Place.BATCH_END:
            epoch_loop.batch_progress.increment_completed()
        if not self.within_epoch:
            self._start_epoch_anew()
        begin, advance = fit_loop.on_advance_start, epoch_loop.advance

        def begin_once() -> None:
            fit_loop.on_advance_start = begin
            self._begin()
            begin()

        def finish_then_advance(data_fetcher: Any) -> None:
            if self.unfinished:
                self.unfinished = False
                self._finish_batch()
            else:
                epoch_loop.advance = advance
                self._advance(advance, data_fetcher)

        replace(fit_loop, "on_advance_start", begin_once)
        replace(epoch_loop, "advance", finish_then_advance)

    def run(self, run: Callable[[], None]) -> None:
        """Run the fit loop; ``run`` is Lightning's method."""
        fit_loop = self.trainer.fit_loop
        if not (self.unfinished or self.place is Place.EPOCH_END) or not fit_loop.done:
            return run()
        # All steps or epochs are done, so that Lightning would not even start. But the last batch or epoch has not
        # ended.
        fit_loop.reset()
        fit_loop.on_run_start()
        if self.unfinished:
            fit_loop.on_advance_start()
            fit_loop.advance()
            fit_loop.on_advance_end()
        else:
            self._begin()
        fit_loop.on_iteration_done()
        fit_loop.on_run_end()

    def _load_positions(self) -> None:
        # Lightning loads rank 0's positions before it tells samplers the epoch, and loads no positions at an epoch's
        # end, or if `configure_optimizers` has read the number of steps.
        fit_loop = self.trainer.fit_loop
        theirs = data_loading.take_saved_positions(self.trainer)
        fit_loop.setup_data()
        if data_loading.combined_loader(fit_loop) is not None:
            state = {"positions": theirs, "seeds": []} if self.own is None else self.own["loaders"]
            self.positions = state["positions"]
            rank_state.set_positions_(self.trainer, self.positions, state["seeds"])

    def _start_epoch_anew(self) -> None:
        fit_loop, progress = self.trainer.fit_loop, self.trainer.fit_loop.epoch_progress
        if self.place is Place.EPOCH_END:
            progress.increment_completed()
        if progress.current.ready > progress.current.started:
            # The checkpoint was written in on_train_epoch_start: the epoch starts again.
            progress.total.ready -= 1
            progress.current.ready -= 1
        # No loop is restarting any more. With `max_steps`, Lightning would take this for a resume within an epoch, and
        # would keep the iterator that it has made already, with other random numbers.
        for loop in (fit_loop, fit_loop.epoch_loop, fit_loop.epoch_loop.val_loop):
            loop.on_iteration_done()

    # ---- after on_train_start, before on_train_epoch_start -----------------------------------------------------------

    def _begin(self) -> None:
        self._warn()
        if self.own is None:
            return
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed if self.within_epoch else 0
        rank_state.set_rebuilt_(self.trainer, self.own["loaders"]["rebuilt"])
        set_logged_values_(self.trainer, self.own["logged"], done)
        set_buffers_(self.trainer, self.buffers)
        rank_state.set_moment_(self.trainer, self.own["moment"])
        if self.place is Place.EPOCH_END:
            self._end_epoch()

    def _end_epoch(self) -> None:
        """End the epoch as Lightning does after ``on_train_epoch_end``: log, and step learning-rate schedulers."""
        counted = self.trainer.fit_loop.epoch_progress.current
        counted.completed -= 1
        logger_connector.show_epoch(self.trainer)
        if is_last_batch(self.trainer):
            self.trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        logger_connector.log_epoch(self.trainer)
        counted.completed += 1

    # ---- in place of the first batch ---------------------------------------------------------------------------------

    def _finish_batch(self) -> None:
        """Let Lightning end the batch at which the checkpoint was written, which is trained, with its validation."""
        progress = self.trainer.fit_loop.epoch_loop.val_loop.batch_progress
        if self.validation == "running":
            for part in ("ready", "started", "processed", "completed"):
                setattr(progress.total, part, getattr(progress.total, part) - getattr(progress.current, part))
        skip_next_validation(self.trainer, self.validation == "done")
        if self.place is Place.BATCH_END and self.own is not None:
            logger_connector.end_batch(self.trainer)
        self._nothing_restarts()

    def _advance(self, advance: Callable[[Any], None], data_fetcher: Any) -> None:
        """Train the first batch."""
        epoch_loop = self.trainer.fit_loop.epoch_loop
        self._nothing_restarts()
        if self.known:
            # Otherwise Lightning looks for a validation that might have been due at the batch before.
            epoch_loop.restarting = False
        try:
            advance(data_fetcher)
        except StopIteration:
            if not self.positions or epoch_loop.batch_progress.current.ready:
                raise
            # A loader whose `__iter__` is a generator function takes the loaded position only now, and it is the last
            # epoch's end.
            iter(data_fetcher)
            advance(data_fetcher)

    def _nothing_restarts(self) -> None:
        # Otherwise no ReduceLROnPlateau is stepped at this epoch's end, and the next validation goes on with the counts
        # of the last one. With `max_steps` the fit loop's `restarting` cannot be set to False.
        self.trainer.fit_loop.on_iteration_done()
        self.trainer.fit_loop.epoch_loop.val_loop.restarting = False

    # ---- what is not exact -------------------------------------------------------------------------------------------

    def _warn(self) -> None:
        if self.trainer.fit_loop.epoch_progress.total.ready == 0:
            return  # the learning-rate finder restores a checkpoint of its own before the run
        doubts = self._doubts()
        if doubts:
            rank_zero_warn(f"This resume is not exact: {'; '.join(doubts)}.")

    def _doubts(self) -> list[str]:
        """Name everything that cannot be exact, each with the change that would make it so."""
        doubts = []
        if not self.known:
            doubts.append("the checkpoint was written without `ExactResume`")
        elif self.own is None:
            doubts.append(
                f"{self._writers} processes wrote the checkpoint and {self.trainer.world_size} read it: resume with as"
                " many"
            )
        if self.place is Place.INSIDE_BATCH:
            doubts.append(
                "the checkpoint was written inside a training batch: write it in `on_train_batch_end` or later"
            )
        batches_are_left = not is_last_batch(self.trainer)
        return doubts + inexact_parts(self.trainer, within_epoch=self.within_epoch and batches_are_left)
