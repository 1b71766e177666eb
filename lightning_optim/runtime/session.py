"""What the callbacks of one running fit share: the true step, the evaluated weights, and the one writer at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_optim.base import module_tensors, shards
from lightning_optim.runtime.files.own_files import OwnFiles
from lightning_optim.runtime.lightning import (
    LightningModule,
    ModelParallelStrategy,
    Trainer,
    TrainerStatus,
)
from lightning_optim.runtime.order import EvaluatedAverage
from lightning_optim.runtime.patching import replaced
from lightning_optim.runtime.refusals import refuse_more_optimizers, warn_unsharded
from lightning_optim.runtime.restored_weights import Restored
from lightning_optim.runtime.spawned import send_back
from lightning_optim.runtime.step import has_gradients, total_steps

if TYPE_CHECKING:
    from lightning_optim.runtime.callback import OptimCallback

Fingerprint: TypeAlias = list[tuple[int, int]]

_fits: WeakKeyDictionary[Trainer, Fit] = WeakKeyDictionary()


class Fit:
    """One run of ``trainer.fit``, from the first ``setup`` of a callback of ours to ``teardown`` or an exception.

    Whatever is installed (optimizer hooks, replaced methods, changed settings) is installed here, so that it is undone
    in one place, in the reverse order, also when something else failed.

    Attributes:
        trainer: The Trainer that runs.
        members: Our callbacks in it, in the order in which their ``setup`` ran.
        average: The average that validation uses, if any.
        own_files: The checkpoints that this process wrote in this fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.members: list[OptimCallback] = []
        self.average: EvaluatedAverage | None = None
        self._undo = contextlib.ExitStack()
        self._started = self._begun = self._ended = self._failed = self._saving = False
        self._total: int | float | None = None
        self._restored, self._load_seen = Restored(trainer), False
        self._heard: WeakSet[Optimizer] = WeakSet()
        self._norms: dict[int, tuple[float, Fingerprint, Tensor]] = {}
        self.own_files = OwnFiles()
        self.replace(trainer.strategy, "save_checkpoint", self.own_files.recording(trainer.strategy.save_checkpoint))

    @staticmethod
    def of(trainer: Trainer) -> Fit:
        """The running fit of ``trainer``; begun here if there is none."""
        if trainer in _fits and _fits[trainer]._failed:
            _fits[trainer].close()  # whoever handled the exception never came to the Trainer's own teardown
        if trainer not in _fits:
            _fits[trainer] = Fit(trainer)
        return _fits[trainer]

    # ---- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """At ``on_fit_start``: hear of each optimizer step that happens. Once, whoever calls first."""
        if self._started:
            return
        self._started = True
        self._restored.start()
        warn_unsharded(self.trainer)
        send_back(self.trainer, self.members)
        for optimizer in self.trainer.optimizers:
            self._hear(optimizer)
        strategy = self.trainer.strategy
        self.replace(strategy, "optimizer_step", self._hearing(strategy.optimizer_step))
        if isinstance(strategy, ModelParallelStrategy):
            self.replace(strategy, "optimizer_state", self._unheard(strategy.optimizer_state))

    def _hear(self, optimizer: Optimizer) -> None:
        self._heard.add(optimizer)
        self._undo.callback(optimizer.register_step_post_hook(self._stepped).remove)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # A fused optimizer unscales inside its step, after every hook. Told that it cannot, Lightning unscales
            # before the hooks and the scaler itself skips the step at an infinity, as with any other optimizer.
            self.replace(optimizer, "_step_supports_amp_scaling", False)

    def _hearing(self, optimizer_step: Callable[..., Any]) -> Callable[..., Any]:
        """Hear of optimizers too that a user puts in the place of others in the middle of a fit."""

        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if optimizer not in self._heard and optimizer in self.trainer.optimizers:
                if self._begun:
                    refuse_more_optimizers(self.members, self.trainer)
                self._hear(optimizer)
            return optimizer_step(optimizer, *args, **kwargs)

        return step

    def begin(self) -> None:
        """At ``on_train_start``: all state is restored. A callback that is new on resume learns how far the run is."""
        if self._begun:
            return
        self._begun = True
        self._restored.begin(any(member.gathers_ranks for member in self.members))
        count = len(self.trainer.optimizers)
        # Of a file that holds no state of ours, Lightning's count of calls is the best there is.
        known = any(member.steps for member in self.members)
        floor = 0 if known or not count else self.trainer.global_step // count
        steps = [max((m.steps[i] for m in self.members if i < len(m.steps)), default=floor) for i in range(count)]
        for member in self.members:
            member.steps = list(steps)

    def loaded(self, checkpoint: dict[str, Any]) -> None:
        """At ``on_load_checkpoint``, before the fit starts or, with sharded weights, after. The first call counts."""
        if self._load_seen or self._begun:
            return
        self._load_seen = True
        self._restored.loaded(checkpoint)

    def end(self, pl_module: LightningModule) -> None:
        """At ``on_fit_end``, when every file is written: one callback of ours decides what the module ends with."""
        if self._ended:
            return
        self._ended = True
        if not self._begun:  # nothing was left to train
            self.begin()
            for member in self._in_order():
                member.resume_ended(self.trainer, pl_module)
        ranked = sorted((m for m in self.members if m.final_rank is not None), key=lambda m: m.final_rank or 0)
        if any(member.write_final_(pl_module) for member in ranked):
            self.average = None  # checkpoints of hooks that come later hold what the module holds, as after the fit

    def fail(self) -> None:
        """At ``on_exception``: close as late as in a fit that ends well.

        Checkpoint callbacks come after ours, and what they write now must still hold the evaluated weights. The
        Trainer's own teardown is the last thing that happens.
        """
        if self._failed:
            return
        self._failed = True
        strategy = self.trainer.strategy
        teardown = strategy.teardown

        def close_and_teardown() -> None:
            self.close()
            teardown()

        self.replace(strategy, "teardown", close_and_teardown)

    def close(self) -> None:
        """Undo everything that was installed."""
        _fits.pop(self.trainer, None)
        self._undo.close()
        for member in self.members:
            member.fit = None

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name`` for the length of the fit."""
        self._undo.enter_context(replaced(owner, name, value))

    @property
    def failed(self) -> bool:
        """Whether an exception ended it: this process's own, perhaps, so that no other rank would answer."""
        return self._failed

    @property
    def running(self) -> bool:
        """Whether it is going on: it did not fail, and its Trainer did not stop without a word."""
        return not self._failed and self.trainer.state.status is TrainerStatus.RUNNING

    @property
    def ranks_answer(self) -> bool:
        """Whether all ranks take part in a checkpoint: after an exception only if some callback counts on that."""
        return not self._failed or any(member.gathers_ranks for member in self.members)

    @contextlib.contextmanager
    def without_average(self) -> Iterator[None]:
        """Within this, validation and files take the module's weights as they are, and not an average's."""
        average, self.average = self.average, None
        try:
            yield
        finally:
            self.average = average

    def undo(self, action: Callable[[], Any]) -> None:
        """Call ``action`` when the fit is closed."""
        self._undo.callback(action)

    # ---- steps -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._begun or self._saving:
            return  # torch steps, at a learning rate of zero, to make the state that it then restores (FSDP2)
        if not has_gradients(optimizer):
            return  # cancelled or dropped: torch calls the hook although nothing moved
        index = self.trainer.optimizers.index(optimizer)
        members = self._in_order()
        for member in members:
            member.steps[index] += 1
        for member in members:
            member.on_after_optimizer_step(self.trainer, self.trainer.lightning_module, optimizer)

    def _in_order(self) -> list[OptimCallback]:
        """Return our callbacks in the order of the Trainer's list.

        A learning-rate finder takes them out of that list for its trial steps, which they must not hear of.
        """
        return [callback for callback in self.trainer.callbacks if callback in self.members]

    def _unheard(self, optimizer_state: Callable[[Optimizer], Any]) -> Callable[[Optimizer], Any]:
        """To save an optimizer that holds no state (FSDP2), torch steps at a learning rate of zero: that is no step."""

        def without_hearing(optimizer: Optimizer) -> Any:
            self._saving = True
            try:
                return optimizer_state(optimizer)
            finally:
                self._saving = False

        return without_hearing

    def share_norm(self, optimizer: Optimizer, grads: Sequence[Tensor], norm_type: float, norm: Tensor) -> None:
        """Keep the norm of the gradients of a step, which whoever clips needs too (:meth:`take_norm`)."""
        self._norms[id(optimizer)] = (norm_type, _fingerprint(grads), norm)

    def take_norm(self, optimizer: Optimizer, grads: Sequence[Tensor], norm_type: float) -> Tensor | None:
        """The norm that was shared in this step, if nobody changed the gradients since.

        It is forgotten then: the gradients of the next step may lie at the same places.
        """
        shared = self._norms.pop(id(optimizer), None)
        if shared is None or shared[0] != norm_type or shared[1] != _fingerprint(grads):
            return None
        return shared[2]

    @property
    def total(self) -> int | float:
        """:func:`total_steps`, computed once: it cannot change while the run goes on."""
        if self._total is None:
            self._total = total_steps(self.trainer)
        return self._total


def _fingerprint(grads: Sequence[Tensor]) -> Fingerprint:
    """What changes when a gradient is written to, or replaced."""
    return [(id(grad), grad._version) for grad in shards.local_shards(grads)]


def evaluated_state(trainer: Trainer) -> dict[str, Tensor]:
    """The weights and buffers that a validation would use now, by their names in the model's ``state_dict``.

    These are an average's once it has started and is the evaluated one, else the module's. The tensors are live
    storage: copy what you keep. Under FSDP2 they are DTensors. Lazy parameters without data are left out.

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = Trainer(logger=False, enable_checkpointing=False, fast_dev_run=True, enable_model_summary=False)
        >>> trainer.strategy.connect(BoringModel())
        >>> list(evaluated_state(trainer))
        ['layer.weight', 'layer.bias']
    """
    fit = _fits.get(trainer)
    averaged = fit.average.averaged_state() if fit is not None and fit.average is not None else {}
    shards.reshard_(trainer.lightning_module)
    named = module_tensors.named_tensors(trainer.lightning_module).items()
    return {**{name: tensor.detach() for name, tensor in named if not is_lazy(tensor)}, **averaged}
