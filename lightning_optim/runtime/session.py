"""Follow one running fit: its state, the steps that it counts, and everything that is undone when it is over."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from lightning_optim.runtime.files.own_files import OwnFiles
from lightning_optim.runtime.final_weights import FinalWeights
from lightning_optim.runtime.lightning import LightningModule, ModelParallelStrategy, Trainer
from lightning_optim.runtime.lightning.logger_connector import logs_in_this_step
from lightning_optim.runtime.lightning.precision import after_gradients, skips_step, unscale_before_hooks
from lightning_optim.runtime.loss_gradients import LossGradients, LossHandler
from lightning_optim.runtime.order import AccumulationWindows, EvaluatedAverage, SessionCallback, Slot, in_order
from lightning_optim.runtime.patching import patched
from lightning_optim.runtime.refusals import refuse_more_optimizers, warn_unsharded
from lightning_optim.runtime.restored_weights import RestoredWeights
from lightning_optim.runtime.run_summary import RunSummary
from lightning_optim.runtime.spawned_processes import send_back
from lightning_optim.runtime.step import OptimizerStep, total_steps


class SessionState(enum.Enum):
    """State of a session, which goes from one to the next and never back. Each fit has a session of its own.

    ::

        SETUP ──> STARTED ──> TRAINING ──> ENDED ──> CLOSED
          └──────────┴───────────┴───────────┴──> FAILED ──> CLOSED

    From each of them it can also be CLOSED at once: a second exception, in a callback's ``on_exception``, keeps the
    Trainer from its teardown, and the next fit closes the session.
    """

    SETUP = "callbacks join and are checked"
    STARTED = "optimizers and sharded parameters exist; weights may still be restored"
    TRAINING = "all state is restored; steps are counted"
    ENDED = "the last checkpoint is written, and the module holds its final weights"
    FAILED = "an exception was raised; Trainer and checkpoint callbacks may still be writing"
    CLOSED = "everything is undone"


_NEXT: dict[SessionState, set[SessionState]] = {
    SessionState.SETUP: {SessionState.STARTED, SessionState.FAILED, SessionState.CLOSED},
    SessionState.STARTED: {SessionState.TRAINING, SessionState.FAILED, SessionState.CLOSED},
    SessionState.TRAINING: {SessionState.ENDED, SessionState.FAILED, SessionState.CLOSED},
    SessionState.ENDED: {SessionState.FAILED, SessionState.CLOSED},
    SessionState.FAILED: {SessionState.CLOSED},
    SessionState.CLOSED: set(),
}

_ATTRIBUTE = "_lightning_optim_session"  # name of the Trainer's attribute: a session lives no longer than its Trainer


class Session:
    """Follow one ``trainer.fit``, for all callbacks of this package that are in it: ``callback.session``.

    It opens in the first ``setup`` of such a callback, and closes in ``teardown`` or after an exception. Everything
    that is installed for the length of the fit is installed here, with :meth:`patch` or :meth:`on_close`, so that it is
    undone in one place, in reverse order, even if undoing something else raises.

    Attributes:
        trainer: The Trainer that runs.
        callbacks: The callbacks of this package in it, in the order in which their ``setup`` ran.
        state: The :class:`SessionState`, which only :meth:`start`, :meth:`begin`, :meth:`end`, :meth:`fail` and
            :meth:`close` change. Every callback calls these; the first call counts.
        average: The average that validation and checkpoints use, if any.
        own_files: The checkpoints that this process wrote in this fit.
        losses: The losses of micro-batches, which :meth:`on_loss` watches.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model, session = BoringModel(), Session(Trainer(barebones=True))
        >>> session.patch(model, "note", "there for the length of the fit")
        >>> session.on_close(model.register_forward_hook(print).remove)
        >>> session.close()
        >>> hasattr(model, "note"), len(model._forward_hooks)
        (False, 0)

    In a callback's ``on_fit_start``, say, the session is ``self.session``, and Lightning's hooks close it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.callbacks: list[SessionCallback] = []
        self.state = SessionState.SETUP
        self.average: EvaluatedAverage | None = None
        self.own_files = OwnFiles()
        self.losses = LossGradients(trainer)
        self._undo = contextlib.ExitStack()
        self._total: int | float | None = None
        self._restored = RestoredWeights(trainer)
        self._final_weights = FinalWeights(trainer, self.callbacks)
        self._summary = RunSummary(trainer, self.callbacks)
        self._watched: WeakSet[Optimizer] = WeakSet()
        # No `SessionState`, since a checkpoint may be written in each of them.
        self._saving_optimizer = False
        self._steps: dict[Optimizer, OptimizerStep | None] = {}  # the optimizers that are stepping now
        self.patch(trainer, _ATTRIBUTE, self)
        self.patch(trainer.strategy, "save_checkpoint", self.own_files.recording(trainer.strategy.save_checkpoint))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copy and pickle a session as ``None``: a copy of a Trainer or of a callback is in no fit."""
        return type(None), ()

    @staticmethod
    def in_setup(trainer: Trainer) -> Session:
        """Return the session of a fit whose ``setup`` is running; the first callback opens it."""
        session = Session.find(trainer)
        if session is not None and session.state is not SessionState.SETUP:
            session.close()  # that of an earlier fit, in which an exception kept the Trainer from its teardown
        return Session.find(trainer) or Session(trainer)

    @staticmethod
    def find(trainer: Trainer) -> Session | None:
        """Return the open session of a Trainer, if there is one."""
        session: Session | None = vars(trainer).get(_ATTRIBUTE)
        return session

    # ---- for the length of the fit -----------------------------------------------------------------------------------

    def patch(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name`` to ``value`` for the length of the fit."""
        self._undo.enter_context(patched(owner, name, value))

    def on_close(self, action: Callable[[], Any]) -> None:
        """Call ``action`` when the fit is over: after ``on_fit_end``, or after an exception."""
        self._undo.callback(action)

    def on_loss(self, callback: SessionCallback, handler: LossHandler) -> None:
        """Call ``handler(loss, grad)`` at the start of each backward pass, for the length of the fit.

        Args:
            callback: The callback to which the function belongs; it is not called while another has taken this callback
                out of the Trainer's list, as a learning-rate finder does.
            handler: Takes the loss of the micro-batch as the user computed it, detached, and the gradient that arrives
                at it: a product of the loss scale, 1 over the size of the window and the weight of the micro-batch.
                Returns a factor for this gradient, or ``None``.
        """
        self.losses.add(callback, handler, self.patch)

    @contextlib.contextmanager
    def without_average(self) -> Iterator[None]:
        """Context manager: validation and checkpoints use the module's own weights instead of the evaluated average."""
        average, self.average = self.average, None
        try:
            yield
        finally:
            self.average = average

    @property
    def failed(self) -> bool:
        """True after an exception. It may have happened in this process alone: call no collective."""
        return self.state is SessionState.FAILED

    @property
    def running(self) -> bool:
        """True while the fit goes on: it has not failed, and its Trainer is running."""
        return not self.failed and self.trainer.state.status == "running"

    @property
    def collectives_allowed(self) -> bool:
        """True if all ranks take part in a checkpoint; after an exception only if a callback relies on that."""
        return not self.failed or any(callback.gathers_ranks for callback in self.callbacks)

    @property
    def total(self) -> int | float:
        """Number of optimizer steps of the whole run (:func:`~lightning_optim.total_steps`), computed once."""
        if self._total is None:
            self._total = total_steps(self.trainer)
        return self._total

    @property
    def wrote_final(self) -> SessionCallback | None:
        """The callback that has written the weights that the module keeps; ``None`` before the end, or if none has."""
        return self._final_weights.writer

    @property
    def windows(self) -> AccumulationWindows | None:
        """Open accumulation windows; ``None`` if nothing accumulates, as in the trial steps of a finder."""
        found: Any = next((callback for callback in self._acting() if callback.slot is Slot.ACCUMULATE), None)
        return found

    # ---- state -------------------------------------------------------------------------------------------------------

    def _enter(self, state: SessionState) -> bool:
        """Go to the next state; return False if another callback has done so before."""
        if state is self.state:
            return False
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"A session cannot go from {self.state.name} to {state.name}: {self.state.value}.")
        self.state = state
        return True

    def start(self) -> None:
        """Watch each optimizer for steps. Called at ``on_fit_start``."""
        if not self._enter(SessionState.STARTED):
            return
        self._restored.start()
        warn_unsharded(self.trainer)
        self._final_weights.start(self.patch)
        send_back(self.trainer, self.callbacks)
        for optimizer in self.trainer.optimizers:
            self._watch(optimizer)
        strategy = self.trainer.strategy
        self.patch(strategy, "optimizer_step", self._watching_new_optimizers(strategy.optimizer_step))
        after_gradients(self.trainer, self._about_to_step, self.patch)
        if isinstance(strategy, ModelParallelStrategy):
            self.patch(strategy, "optimizer_state", self._not_counting(strategy.optimizer_state))

    def loaded(self, checkpoint: dict[str, Any]) -> None:
        """Note what Lightning restores. Called at ``on_load_checkpoint``: in SETUP, or in STARTED if it is sharded."""
        if self.state in (SessionState.SETUP, SessionState.STARTED):
            self._restored.loaded(checkpoint)

    def begin(self, trains: bool = True) -> None:
        """Begin to count steps. Called at ``on_train_start``.

        A callback that is new in a resumed run takes over the count of the callbacks that were in it before.

        Args:
            trains: False if nothing is left to train.
        """
        if not self._enter(SessionState.TRAINING):
            return
        self._restored.begin(any(callback.gathers_ranks for callback in self.callbacks))
        count = len(self.trainer.optimizers)
        # If the checkpoint has no state of this package, only Lightning's count of calls is known.
        known = any(callback.steps for callback in self.callbacks)
        floor = 0 if known or not count else self.trainer.global_step // count
        steps = [
            max((callback.steps[index] for callback in self.callbacks if index < len(callback.steps)), default=floor)
            for index in range(count)
        ]
        for callback in self.callbacks:
            callback.steps = list(steps)
        if trains:
            self._summary.start()

    def end(self, pl_module: LightningModule) -> None:
        """Write the weights that the module keeps. Called at ``on_fit_end``, after the last checkpoint."""
        if self.state is SessionState.STARTED:  # nothing was left to train
            self.begin(trains=False)
            for callback in self._acting():
                callback.resume_ended(self.trainer, pl_module)
        if not self._enter(SessionState.ENDED):
            return
        if self._final_weights.write_(pl_module):
            self.average = None  # a checkpoint that a later hook writes holds what the module holds, as after the fit
        self._summary.end()

    def fail(self, exception: BaseException) -> None:
        """Close the session in the strategy's teardown, the last thing that the Trainer does.

        Called at ``on_exception``, after which Lightning calls no ``teardown`` of callbacks. It cannot close at once:
        checkpoint callbacks come after those of this package, and a checkpoint that they write on an exception must
        still hold the evaluated weights.
        """
        if not self._enter(SessionState.FAILED):
            return
        strategy = self.trainer.strategy
        teardown = strategy.teardown

        def close_and_teardown() -> None:
            self.close()
            teardown()

        self.patch(strategy, "teardown", close_and_teardown)
        if isinstance(exception, KeyboardInterrupt):
            self._summary.interrupted()

    def close(self) -> None:
        """Undo everything that was installed."""
        if self._enter(SessionState.CLOSED):
            self._undo.close()

    # ---- steps -------------------------------------------------------------------------------------------------------

    @property
    def counts_steps(self) -> bool:
        """True if a step of an optimizer is one of the run.

        Before training torch (FSDP2) makes the state that it restores by a step with learning rate 0, and so it does
        when it saves an optimizer that has no state yet.
        """
        return self.state is SessionState.TRAINING and not self._saving_optimizer

    @torch.no_grad()
    def _about_to_step(self, optimizer: Any) -> None:
        """Tell callbacks that the optimizer moves the weights next, if it will."""
        plain: Optimizer = getattr(optimizer, "optimizer", optimizer)
        if not self.counts_steps or plain not in self._steps:
            return
        if not self.current_step(plain).dropped and not skips_step(self.trainer, plain):
            for callback in self._acting():
                callback.on_before_weight_update(self.trainer, self.trainer.lightning_module, plain)

    @torch.no_grad()
    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if not self.counts_steps:
            return
        self._steps.setdefault(optimizer, None)  # a user may call `step` of torch's optimizer itself
        step, callbacks = self.current_step(optimizer), self._acting()
        if not step.dropped:  # torch calls the hook although nothing moved
            for callback in callbacks:
                callback.steps[step.index] += 1
            for callback in callbacks:
                callback.on_after_optimizer_step(self.trainer, self.trainer.lightning_module, optimizer)
        self._steps.pop(optimizer, None)  # a callback may have stepped it again in the hook above

    def current_step(self, optimizer: Optimizer) -> OptimizerStep:
        """Return the step of an optimizer that is under way: one object, which is read anew at each call.

        Between two steps, return the next one, as it is now: a new object at each call.
        """
        step = self._steps.get(optimizer) or self._next_step(optimizer)
        if optimizer in self._steps:
            self._steps[optimizer] = step
        step.logs = logs_in_this_step(self.trainer)
        step.refresh()
        return step

    def _next_step(self, optimizer: Optimizer) -> OptimizerStep:
        if optimizer not in self.trainer.optimizers:
            raise RuntimeError(f"There is no step of {type(optimizer).__name__}: it is not in `trainer.optimizers`.")
        if self.state in (SessionState.SETUP, SessionState.STARTED):
            raise RuntimeError("There is no step before `on_train_start`, since the count of steps is restored then.")
        index = self.trainer.optimizers.index(optimizer)
        return OptimizerStep(
            optimizer,
            index=index,
            number=self.callbacks[0].steps[index],
            total=lambda: self.total,
            module=self.trainer.lightning_module,
        )

    def _acting(self) -> list[SessionCallback]:
        return in_order(self.callbacks, self.trainer)

    def _watch(self, optimizer: Optimizer) -> None:
        self._watched.add(optimizer)
        self.on_close(optimizer.register_step_post_hook(self._stepped).remove)
        unscale_before_hooks(self.trainer, optimizer, self.patch)

    def _watching_new_optimizers(self, optimizer_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``strategy.optimizer_step``: watch an optimizer that a user put in place of another during the fit."""

        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if optimizer not in self._watched and optimizer in self.trainer.optimizers:
                if self.state is SessionState.TRAINING:
                    refuse_more_optimizers(self.callbacks, self.trainer)
                self._watch(optimizer)
            self._steps[optimizer] = None
            try:
                return optimizer_step(optimizer, *args, **kwargs)
            finally:
                self._steps.pop(optimizer, None)  # also after a step that the scaler skipped, or that raised

        return step

    def _not_counting(self, optimizer_state: Callable[[Optimizer], Any]) -> Callable[[Optimizer], Any]:
        """Wrap ``strategy.optimizer_state``, in which torch may take a step that is not one of the run.

        To save an optimizer that has no state yet, torch (under FSDP2) makes the state by a step with learning rate 0.
        """

        def state_of(optimizer: Optimizer) -> Any:
            self._saving_optimizer = True
            try:
                return optimizer_state(optimizer)
            finally:
                self._saving_optimizer = False

        return state_of
