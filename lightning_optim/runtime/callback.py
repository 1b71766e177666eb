"""The base class of every callback here, public for users' own: one hook that Lightning lacks, state, order, life."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.runtime import checkpoint_state, spawned_processes
from lightning_optim.runtime.lightning import LightningModule, LightningOptimizer, Trainer
from lightning_optim.runtime.order import Slot, arrange
from lightning_optim.runtime.overridden_hooks import OverridableHooks
from lightning_optim.runtime.refusals import in_another_fit, refuse_endless, refuse_setup, refuse_start
from lightning_optim.runtime.session import Session
from lightning_optim.runtime.step import OptimizerStep


class OptimCallback(OverridableHooks):
    r"""A Lightning callback that hears of each optimizer step that really happened.

    Lightning has no hook after an optimizer step (asked for since 2022, `#11688`_), and ``trainer.global_step`` also
    grows when a GradScaler skipped the step, and once for each optimizer. A subclass of this class overrides
    :meth:`on_after_optimizer_step`, under automatic and manual optimization, in every precision, under DDP, FSDP2 and
    tensor parallelism.

    What a subclass may rely on:

    * :attr:`steps` counts the real steps of each optimizer, also over a resume.
    * What it remembers is in :meth:`extra_state` and :meth:`load_extra_state`: tensors and plain values. DTensors are
      gathered when they are saved; plain tensors in which ranks differ are named by :meth:`rank_state`.
    * Gradients in ``on_before_optimizer_step`` are whole, averaged over ranks and unscaled, also for a fused optimizer
      under a GradScaler. Take them from :meth:`current_step`.
    * What it installs with ``self.session.patch(object, "name", value)`` is put back at the end, also after an
      exception.
    * A hook that it overrides, :meth:`reset` and the state's methods need no ``super()``: what this class does there,
      and any other class of this package that it derives from, is done before, once. The hooks of a step,
      ``on_before_optimizer_step`` and :meth:`on_after_optimizer_step`, are the exception: to override these is to
      change what is done to the step, and ``super()`` does what the class itself does.

    Args:
        name: Tells two callbacks of one class and one identity apart, in checkpoints. Lightning refuses them without
            it.

    Attributes:
        steps: The real steps of each optimizer in this run, in the order of ``trainer.optimizers``.

    Example::

        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Steps(OptimCallback):
        ...     def on_after_optimizer_step(self, trainer, pl_module, optimizer):
        ...         self.largest = max(p.abs().max().item() for p in pl_module.parameters())
        >>> trainer = Trainer(max_steps=3, callbacks=[Steps()], barebones=True)
        >>> trainer.fit(BoringModel())
        >>> trainer.callbacks[0].steps
        [3]

    .. _#11688: https://github.com/Lightning-AI/pytorch-lightning/issues/11688
    """

    slot: ClassVar[Slot | None] = None
    """Where it acts within a step; ``None`` (a user's own) keeps its place in the list."""
    touches: ClassVar[frozenset[str]] = frozenset()
    """``"gradients"``, ``"weights"``: what must not be hidden from it by a strategy or an optimizer."""
    final_rank: ClassVar[int | None] = None
    """The lowest rank that has something to write decides what the module holds after ``fit``."""
    gathers_ranks: ClassVar[bool] = False
    """Whether its state is gathered from all ranks, whenever a checkpoint is written."""
    evaluates: bool = False
    """Whether validation uses weights that this callback holds."""

    name: str | None = None
    fit: Session | None = None
    """The session of the running fit, ``None`` outside of one."""
    launcher_id: int | None = None  # the `id` of the callback of which this is a copy, in the process that copied it
    ran_elsewhere: bool = False  # the last fit ran in processes that a launcher started
    not_returned: str = ""  # the reason why the attributes of such a fit did not come back
    _stage: str | None = None

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.steps: list[int] = []
        spawned_processes.remember(self)

    # ---- for subclasses ----------------------------------------------------------------------------------------------

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called once after each step of ``optimizer`` that really happened, without gradient tracking.

        The weights are new; the gradients are those that the optimizer used. Not called when the scaler skipped the
        step, when it was dropped (:func:`~lightning_optim.drop_step`), or when ``training_step`` returned ``None``.
        """

    def extra_state(self) -> dict[str, Any]:
        """What is remembered beyond :attr:`steps`: tensors and plain values, as ``weights_only=True`` demands.

        It is called on all ranks, and what rank 0 returns is stored. A DTensor may be a leaf: it is gathered.
        """
        return {}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take over what :meth:`extra_state` returned. Called before or after ``on_fit_start``, by strategy."""

    def rank_state(self) -> dict[str, Tensor]:
        """Tensors of :meth:`extra_state` that each rank has of its own, such as statistics of its batches, by path.

        The path of ``extra["seen"]["mean"]`` is ``"seen/mean"``. The other ranks' are stored beside rank 0's where they
        differ, and each rank gets its own back; with another number of ranks, each gets the mean. DTensors and what is
        equal on all ranks need no path here.
        """
        return {}

    def displaced(self) -> dict[str, Tensor]:
        """Tensors of the module, by plain name, in whose place this callback has put others for a while."""
        return {}

    def reset(self) -> None:
        """Forget an earlier fit. Called in ``setup("fit")``, before any state is loaded."""

    def write_final_(self, pl_module: LightningModule) -> bool:
        """Write into the module what it shall hold after ``fit``, if there is anything; return whether there was."""
        return False

    def resume_ended(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what was loaded where nothing was left to train, so that ``on_train_start`` was not called."""

    @property
    def identity(self) -> dict[str, Any]:
        """The arguments that say which callback this is. Numbers that a user tunes are not in it."""
        return {}

    def batches_per_step(self, epoch: int) -> int:
        """For who accumulates (slot ACCUMULATE): the micro-batches in a step of ``epoch``."""
        return 1

    @property
    def needs_total(self) -> bool:
        """Whether a schedule that is not constant, or a start given as a fraction, needs the run's length."""
        return False

    @property
    def stays(self) -> frozenset[str]:
        """Attributes that stay in another process in which a fit ran (``ddp_spawn``): large ones, such as weights."""
        return frozenset()

    def current_step(self, optimizer: Optimizer | LightningOptimizer) -> OptimizerStep:
        """Return the step of ``optimizer`` that is under way: its number, learning rates, weights, gradients and norm.

        To be called in ``on_before_optimizer_step`` and :meth:`on_after_optimizer_step`, anew in each. All callbacks of
        a fit share one object, so that a norm that one of them has computed is at hand for the next.

        Args:
            optimizer: One of ``trainer.optimizers``, or the wrapper that ``pl_module.optimizers()`` returns for it.

        Raises:
            RuntimeError: Outside of a fit.
        """
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self.session.current_step(plain)

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Under which name a checkpoint holds the state: class, identity, and ``name`` if there is one."""
        identity = self.identity if self.name is None else {**self.identity, "name": self.name}
        return self._generate_state_key(**identity) if identity else type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint. Under FSDP2 a collective: Lightning calls it on all ranks."""
        return checkpoint_state.export({"steps": list(self.steps), **self.extra_state()}, self.fit and self.fit.trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's state; not for ``validate``, ``test`` and ``predict``, which must not touch it."""
        if self._stage in (None, "fit"):
            extra = dict(state_dict)
            self.steps = list(extra.pop("steps", []))
            self.load_extra_state(extra)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put sharded state into a distributed checkpoint, beside the optimizers' shards, and what ranks differ in."""
        checkpoint_state.save_shards(self.extra_state, trainer, checkpoint, self.state_key)
        self._save_ranks(trainer, checkpoint)

    def _save_ranks(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        own = type(self).rank_state is not OptimCallback.rank_state
        if own and (self.fit is None or self.fit.collectives_allowed):
            checkpoint_state.save_ranks(self.rank_state(), trainer, checkpoint, self.state_key)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read sharded state back from a distributed checkpoint, and take what this rank had."""
        if self._stage == "fit":
            checkpoint_state.load_shards(trainer, pl_module, checkpoint, self.state_key)
            checkpoint_state.load_ranks(trainer, checkpoint, self.state_key)
            self.session.loaded(checkpoint)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the running fit, its Trainer and its module: a copy is in no fit."""
        return {**super().__getstate__(), "fit": None, "launcher_id": id(self)}

    def __setstate__(self, held: dict[str, Any]) -> None:
        self.__dict__.update(held)
        spawned_processes.remember(self)

    def __repr__(self) -> str:
        return self.state_key

    # ---- life --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, forget an earlier fit, and take our place in the order."""
        if self.fit is not None and not self.fit.running:
            self.fit.close()  # the exception was handled before the Trainer's own teardown
        if self._is_in_another_fit(trainer):
            if stage == "fit":
                raise in_another_fit(self)
            return
        self._stage = stage
        if stage != "fit":
            return
        refuse_setup(self, trainer)
        self.fit = Session.of(trainer)
        self.fit.callbacks.append(self)
        self.fit.on_close(self._leave)
        self.steps, self.ran_elsewhere, self.not_returned = [], False, ""
        self.reset()
        arrange(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers and sharded parameters are there; weights may still be restored after this."""
        refuse_start(self, trainer)
        self.session.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All state is restored: the earliest hook at which weights may be read."""
        self.session.begin()
        if self.needs_total:
            refuse_endless(self, self.session.total)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every file is written: now the module gets what it ends with."""
        self.session.end(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put back all that was installed."""
        if self._is_in_another_fit(trainer):
            self._leave_nested()
        elif self.fit is not None:
            self.fit.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """See that all that was installed is put back: after an exception Lightning calls no ``teardown``."""
        if self._is_in_another_fit(trainer):
            self._leave_nested()
        elif self.fit is not None:
            self.fit.fail()

    def _leave(self) -> None:
        self.fit = None

    def _is_in_another_fit(self, trainer: Trainer) -> bool:
        """Return True if the fit of another Trainer is running, within which this Trainer runs."""
        return self.fit is not None and self.fit.trainer is not trainer

    def _leave_nested(self) -> None:
        """Log to the module of the running fit again: each Trainer binds its own module's functions to a callback."""
        module = self.session.trainer.lightning_module
        self.log, self.log_dict = module.log, module.log_dict

    @property
    def session(self) -> Session:
        """The session of the running fit: :attr:`fit`, or a RuntimeError outside of one."""
        if self.fit is None:
            raise RuntimeError(f"{type(self).__name__} is in no fit: a Trainer calls its hooks")
        return self.fit

    # ---- logging -----------------------------------------------------------------------------------------------------

    @staticmethod
    def logs_now(trainer: Trainer) -> bool:
        """Whether this batch is one at which values are logged: what is only logged is computed only then."""
        return trainer._logger_connector.should_update_logs

    def log_value(self, pl_module: LightningModule, name: str, value: Tensor | float, optimizer: Optimizer) -> None:
        """Log a value of this step; with several optimizers one name each, since under one name the last would win."""
        optimizers = pl_module.trainer.optimizers
        suffix = f"/{optimizers.index(optimizer)}" if len(optimizers) > 1 else ""
        pl_module.log(name + suffix, value, on_step=True, on_epoch=False)
