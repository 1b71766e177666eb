"""OptimCallback: the base class of every callback of this package, and of a user's own."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.base.construction import Constructed
from lightning_optim.runtime import callback_state, ran_elsewhere
from lightning_optim.runtime.lightning import LightningModule, LightningOptimizer, Trainer
from lightning_optim.runtime.lightning.base_classes import join_packages
from lightning_optim.runtime.lightning.logger_connector import logs_in_this_step
from lightning_optim.runtime.order import Slot, arrange
from lightning_optim.runtime.overridden_hooks import OverridableHooks, is_overridden_by_user
from lightning_optim.runtime.ran_elsewhere import RanIn
from lightning_optim.runtime.refusals import in_another_fit, refuse_setup, refuse_start, refuse_unknown_length
from lightning_optim.runtime.session import Session
from lightning_optim.runtime.state_versions import converted, with_version
from lightning_optim.runtime.step import OptimizerStep


class OptimCallback(Constructed, OverridableHooks):
    r"""Act at optimizer steps: the base class of every callback of this package, and of your own.

    Lightning has no hook after an optimizer step (asked for since 2022, `#11688`_), and ``trainer.global_step`` also
    grows when a GradScaler skipped the step, and once for each optimizer. A subclass of this class overrides
    :meth:`on_after_optimizer_step`, under automatic and manual optimization, in every precision, under DDP, FSDP2 and
    tensor parallelism.

    Within a step:

    * :meth:`current_step` returns the step that is under way: its number, weights, gradients, names, learning rates and
      norm. In ``on_before_optimizer_step`` the gradients are whole, averaged over ranks and unscaled, also for a fused
      optimizer under a GradScaler. Scale them in place, or drop the step with :func:`~lightning_optim.drop_step`.
    * :attr:`steps` counts the steps of each optimizer that were really taken, also over a resume.
    * :meth:`log_value` logs a value of a step. Compute it only if ``current_step(optimizer).logs``.

    Over a fit, Lightning goes through ``setup``, restoring the checkpoint, ``on_fit_start`` and ``on_train_start``, in
    this order; under FSDP2 it restores after ``on_fit_start``, once the parameters are sharded. So look up parameters
    in ``on_fit_start``, and read their values from ``on_train_start`` on. :meth:`load_extra_state` may run before both.

    * :meth:`reset` forgets an earlier fit, so that one object may be used in several fits, one after the other.
    * :meth:`extra_state` and :meth:`load_extra_state` save and load what the callback remembers: tensors and plain
      values. DTensors are gathered when they are saved. :meth:`rank_state` names the tensors in which ranks differ.
    * ``self.session.patch(owner, "name", value)`` sets an attribute of the Trainer, the module or any other object for
      the length of the fit, and ``self.session.on_close(action)`` calls a function at its end. All of it is undone in
      reverse order after ``on_fit_end``, or after an exception.
    * ``total``, in ``current_step(optimizer).total``, is the number of steps of the whole run. If you use it, override
      :attr:`needs_total`, so that a run without an end is refused at its start.

    No hook needs ``super()``: the part of this class, and of any other class of this package from which a subclass
    derives, runs once, before the subclass's own part. The same holds for :meth:`reset` and the methods of the
    state. The two hooks of a step are the exception: to override ``on_before_optimizer_step`` or
    :meth:`on_after_optimizer_step` of a class such as ``GradientClipping`` is to change what it does to the step, and
    ``super()`` does what the class itself does. A constructor calls ``super().__init__()``, as in any Python class.

    Callbacks of this package act in the order of their :class:`~lightning_optim.Slot`, whatever the order of the list.
    One without a slot, such as your own, keeps its place in the list: list it first to see the gradients before any of
    them acts, and last to see them as the optimizer does.

    Args:
        name: Distinguishes two callbacks of one class with equal arguments in checkpoints. Lightning refuses two such
            callbacks without it.
        summary: If False, no lines are logged at the start and the end of a fit with this callback, which say what is
            on and what was done. Default True; they are also off with ``Trainer(enable_model_summary=False)``.

    Attributes:
        steps: Number of steps that each optimizer has taken in this run, in the order of ``trainer.optimizers``.
        fit: The session of the running fit, ``None`` outside of a fit.

    Example::

        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class UnitRows(OptimCallback):
        ...     '''Scale each row of every matrix to norm 1 after a step; remember the mean norm before that.'''
        ...     def reset(self):
        ...         self.mean = {}
        ...     def on_after_optimizer_step(self, trainer, pl_module, optimizer):
        ...         step = self.current_step(optimizer)
        ...         for name, weight in zip(step.names, step.weights):
        ...             if weight.ndim == 2:
        ...                 norm = weight.norm(dim=1, keepdim=True)
        ...                 weight.div_(norm)
        ...                 self.mean[name] = norm.mean()
        ...     def extra_state(self):
        ...         return {"mean": self.mean}
        ...     def load_extra_state(self, extra):
        ...         self.mean = extra["mean"]
        >>> callback, model = UnitRows(), BoringModel()
        >>> Trainer(max_steps=3, callbacks=[callback], barebones=True).fit(model)
        >>> callback.steps, list(callback.mean)
        ([3], ['layer.weight'])
        >>> torch.allclose(model.layer.weight.norm(dim=1), torch.ones(2))
        True

    .. _#11688: https://github.com/Lightning-AI/pytorch-lightning/issues/11688
    """

    name: str | None = None
    summary: bool = True
    fit: Session | None = None
    _token: str = ""  # names this object, and no copy of it
    _ancestors: tuple[str, ...] = ()  # the tokens of the objects that this one is a copy of, the oldest first
    ran_in: RanIn = ""  # where the last fit ran, if it did not run in this object
    not_returned: str = ""  # the reason why the attributes of such a fit did not come back
    _stage: str | None = None

    # The techniques of this package set these. The defaults are right for a user's callback.

    slot: ClassVar[Slot | None] = None
    """Place within a step. ``None``: the callback keeps its place in the Trainer's list."""
    touches: ClassVar[frozenset[str]] = frozenset()
    """``"gradients"``, ``"weights"``, or both: a strategy or an optimizer that hides them is refused."""
    final_rank: ClassVar[int | None] = None
    """Priority of :meth:`write_final_`: of all callbacks that have weights to write, the lowest writes them."""
    gathers_ranks: ClassVar[bool] = False
    """True if the state is gathered from all ranks for every checkpoint."""
    evaluates: bool = False
    """True if validation uses weights that this callback holds."""

    def __init__(self, name: str | None = None, summary: bool = True) -> None:
        if not isinstance(name, str | None):
            raise ValueError(f"`name` must be text that tells two callbacks of one class apart, or None, got {name!r}")
        self.name, self.summary = name, summary
        self.steps: list[int] = []
        ran_elsewhere.register(self)

    # ---- to override -------------------------------------------------------------------------------------------------

    def on_before_weight_update(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Act just before a step of ``optimizer`` moves the weights. Gradients are not tracked.

        All hooks of the step have run and gradients are clipped. It is called only if the step will be taken: not when
        it was dropped, nor when the scaler skips it. Read the weights here, or change them as weight decay does.
        """

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Act after a step of ``optimizer`` that was really taken. Gradients are not tracked.

        The weights are new; the gradients are those that the optimizer used. It is not called when the scaler skipped
        the step, when the step was dropped (:func:`~lightning_optim.drop_step`), or when ``training_step`` returned
        ``None``.
        """

    def reset(self) -> None:
        """Forget an earlier fit. Called in ``setup("fit")``, before any state is loaded."""

    def extra_state(self) -> dict[str, Any]:
        """Return the state beyond :attr:`steps`: tensors and plain values, which ``weights_only=True`` loads.

        It is called on all ranks, and the result of rank 0 is saved. A leaf may be a DTensor: it is gathered.
        """
        return {}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Load what :meth:`extra_state` returned. Called before ``on_fit_start``, or after it with sharded weights."""

    def rank_state(self) -> dict[str, Tensor]:
        """Return the tensors of :meth:`extra_state` that differ between ranks, such as statistics of batches, by path.

        The path of ``extra["seen"]["mean"]`` is ``"seen/mean"``. The tensors of other ranks are saved beside those of
        rank 0 where they differ, and each rank loads its own; with another number of ranks, each loads their mean.
        DTensors, and tensors that are equal on all ranks, need no path here.
        """
        return {}

    @property
    def identity(self) -> dict[str, Any]:
        """Arguments that distinguish two callbacks of this class in a checkpoint.

        Numbers to tune are left out: a run that resumes with another number finds its state, and uses that number.
        """
        return {}

    @property
    def needs_total(self) -> bool:
        """True if the callback needs the number of steps of the whole run, as a schedule does."""
        return False

    @property
    def final_opt_out(self) -> str:
        """Words for a message: how to keep it from :meth:`write_final_`; empty if it does not write."""
        return "" if self.final_rank is None else f"leave {type(self).__name__} out"

    @property
    def stays(self) -> frozenset[str]:
        """Names of large attributes, such as weights, that ``ddp_spawn`` does not send back from its processes."""
        return frozenset()

    def displaced(self) -> dict[str, Tensor]:
        """Return the module's own tensors, by plain name, if the module holds tensors of this callback instead."""
        return {}

    def write_final_(self, pl_module: LightningModule) -> bool:
        """Write the weights that the module holds after ``fit``; return False if there are none to write."""
        return False

    def resume_ended(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the loaded state in a run with nothing left to train, in which ``on_train_start`` is not called."""

    def batches_per_step(self, epoch: int) -> int:
        """Return the number of micro-batches in a step of ``epoch``, if the callback accumulates gradients."""
        return 1

    def describe_step(self, index: int) -> tuple[str, str]:
        """Return what it does before, and after, a step of the optimizer with this index, in a few words.

        The words of all callbacks are logged once at the start, joined by arrows; "" adds none. Weights and optimizers
        exist. By default, a callback of your own that acts at a step is shown as it prints.
        """
        before, after = (
            is_overridden_by_user(self, hook) for hook in ("on_before_optimizer_step", "on_after_optimizer_step")
        )
        return self.brief if before else "", self.brief if after and not before else ""

    def describe_run(self) -> str:
        """Return a line on what it does beside the steps, to be logged once at the start; "" adds none."""
        return ""

    def report(self) -> str:
        """Return a few words on what it has done, to be logged at the end of a fit; "" adds none.

        Called on rank zero, when the module holds the weights that it keeps (``self.session.wrote_final``), and when
        the user has interrupted the fit (``self.session.failed``), which leaves the raw weights in the module.
        """
        return ""

    # ---- to call -----------------------------------------------------------------------------------------------------

    def current_step(self, optimizer: Optimizer | LightningOptimizer) -> OptimizerStep:
        """Return the step of ``optimizer`` that is under way: its number, learning rates, weights, gradients and norm.

        To be called in ``on_before_optimizer_step`` and :meth:`on_after_optimizer_step`, anew in each. All callbacks of
        a fit share one object, so that a norm that one of them has computed is at hand for the next. In a hook between
        two steps it is the next step, as it is now.

        Args:
            optimizer: One of ``trainer.optimizers``, or the wrapper that ``pl_module.optimizers()`` returns for it.

        Raises:
            RuntimeError: Outside of a fit, before ``on_train_start``, or for an optimizer that is not in
                ``trainer.optimizers``.
        """
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self.session.current_step(plain)

    @property
    def session(self) -> Session:
        """The session of the running fit: ``patch``, ``on_close``, ``total``. A RuntimeError outside of a fit."""
        if self.fit is None:
            raise RuntimeError(f"{type(self).__name__} is in no fit: ask for its session in a hook of `trainer.fit`.")
        return self.fit

    @staticmethod
    def logs_now(trainer: Trainer) -> bool:
        """Return True if the values of this batch are logged; compute what is only logged only then."""
        return logs_in_this_step(trainer)

    def log_value(self, pl_module: LightningModule, name: str, value: Tensor | float, optimizer: Optimizer) -> None:
        """Log a value of this step as ``name``, or, with several optimizers, as ``name/0``, ``name/1``, …."""
        optimizers = pl_module.trainer.optimizers
        suffix = f"/{optimizers.index(optimizer)}" if len(optimizers) > 1 else ""
        pl_module.log(name + suffix, value, on_step=True, on_epoch=False)

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: class, :attr:`identity`, and ``name`` if there is one."""
        identity = self.identity if self.name is None else {**self.identity, "name": self.name}
        return f"{type(self).__qualname__}{identity!r}" if identity else type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. A collective under FSDP2, where Lightning calls it on all ranks."""
        state = {"steps": list(self.steps), **self.extra_state()}
        return callback_state.export(with_version(state), self.fit and self.fit.trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint's state for a fit; a no-op in ``validate``, ``test`` and ``predict``."""
        if self._stage in (None, "fit"):
            extra = converted(self, state_dict)
            self.steps = list(extra.pop("steps", []))
            self.load_extra_state(extra)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add sharded state to a distributed checkpoint, and the tensors that differ between ranks."""
        callback_state.save_shards(self.extra_state, trainer, checkpoint, self.state_key)
        self._save_ranks(trainer, checkpoint)

    def _save_ranks(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        own = type(self).rank_state is not OptimCallback.rank_state
        if own and (self.fit is None or self.fit.collectives_allowed):
            callback_state.save_ranks(self.rank_state(), trainer, checkpoint, self.state_key)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load sharded state from a distributed checkpoint, and the tensors of this rank."""
        if self._stage == "fit":
            callback_state.load_shards(trainer, pl_module, checkpoint, self.state_key)
            callback_state.load_ranks(trainer, checkpoint, self.state_key)
            self.session.loaded(checkpoint)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the running fit, its Trainer and its module: a copy is in no fit."""
        return {**super().__getstate__(), "fit": None, "_ancestors": ran_elsewhere.ancestors_of_copy(self)}

    def __setstate__(self, held: dict[str, Any]) -> None:
        self.__dict__.update(held)
        ran_elsewhere.register(self)

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the session of the fit: refuse what cannot work, forget an earlier fit, sort the callbacks by slot.

        A callback is in one fit at a time. A nested Trainer that fits with it is refused; one that only evaluates does
        not change it.
        """
        join_packages()  # done before, unless the package was imported in a way that `sys.meta_path` has no part in
        if self.fit is not None and (not self.fit.running or (stage == "fit" and self.fit.trainer is trainer)):
            self.fit.close()  # an earlier fit, in which an exception kept the Trainer from its teardown
        if self._is_in_another_fit(trainer):
            if stage == "fit":
                raise in_another_fit(self)
            return
        self._stage = stage
        if stage != "fit":
            return
        refuse_setup(self, trainer)
        self.fit = Session.in_setup(trainer)
        self.fit.callbacks.append(self)
        self.fit.on_close(self._leave_fit)
        ran_elsewhere.begins_fit(self)
        self.steps = []
        self.reset()
        arrange(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the optimizers. Sharded parameters exist by now; their weights may be restored after this hook."""
        refuse_start(self, trainer)
        self.session.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count steps. All state is restored: no earlier hook may read weights."""
        self.session.begin()
        if self.needs_total:
            refuse_unknown_length(self, self.session.total)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights that the module keeps: the last checkpoint is written."""
        self.session.end(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo all that was installed for the fit."""
        if self._is_in_another_fit(trainer):
            self._return_to_fit()
        elif self.fit is not None:
            self.fit.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo all that was installed, when the strategy is torn down: Lightning calls no ``teardown`` after this."""
        if self._is_in_another_fit(trainer):
            self._return_to_fit()
        elif self.fit is not None:
            self.fit.fail(exception)

    def _leave_fit(self) -> None:
        self.fit = None

    def _is_in_another_fit(self, trainer: Trainer) -> bool:
        """Return True if the fit of another Trainer is running, within which this Trainer runs."""
        return self.fit is not None and self.fit.trainer is not trainer

    def _return_to_fit(self) -> None:
        """Bind ``log`` to the module of the running fit again: the nested Trainer has bound it to its own module."""
        module = self.session.trainer.lightning_module
        self.log, self.log_dict = module.log, module.log_dict
