"""Penalize the outputs of modules, with gradients that are added in closed form where the outputs are."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_optim.base.module_selection import ModuleSelectors, check_module_selectors, described, select_modules
from lightning_optim.base.policy import belongs_to
from lightning_optim.base.suggestions import shown
from lightning_optim.regularization.penalized_outputs import PenalizedOutputs
from lightning_optim.regularization.penalties.penalty import Penalty, add_grads_, is_elementwise
from lightning_optim.regularization.term_names import names_beside
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import LightningModule, ModelParallelStrategy, Trainer, rank_zero_warn
from lightning_optim.runtime.lightning.modules import compile_again
from lightning_optim.runtime.refusals import refuse_line_search


class ActivationRegularization(OptimCallback):
    r"""Penalize the outputs of modules: :math:`L = L_{task} + \frac{1}{B} \sum_m P(y_m)`.

    :math:`P(y_m)` is the penalty of all elements of the output of module :math:`m`, and :math:`B` the size of its first
    dimension, the batch, as in Keras. With :class:`L1` most activations become small, with :class:`L2` none becomes
    large.

    Nothing changes in the model. A forward hook on each module adds :math:`P'(y) / B` to the gradient of the output
    where that arrives in the backward pass, times the gradient that arrived at the loss. So accumulation, weighted
    windows and a loss scale act on it as on the loss, and the result is that of adding the term to the loss, also with
    activation checkpointing and in half precision, where the formula is computed in fp32. The loss that the module logs
    stays that of the task.

    A module that is called several times is penalized for each call. Outputs of a validation, or without gradients, are
    not penalized, nor is an output on which the loss does not depend: a warning says so after the first epoch. Outputs
    of frozen weights are penalized once these are unfrozen.

    The values of the terms are logged as ``regularization/activations/l1``, …, in the unit of the loss: those of the
    batch at a logged step, the mean over ranks. They are not logged under tensor parallelism, where a process may hold
    a part of an output.

    Args:
        terms: A penalty that acts element by element, such as ``L1(1e-5)``, or a list of them. Schedules of a strength
            follow the steps of the first optimizer.
        on: The modules: a glob over module names, which takes the innermost modules that it matches (``"encoder.*"``:
            the layers in the encoder), a name in full (``"encoder"``: its output alone), a module class, a predicate
            ``(name, module) -> bool``, or a list of these. An output is a tensor, or tensors in tuples, lists and
            dictionaries; of attention and recurrent layers the first one counts. The first dimension must be the batch;
            for layers with ``batch_first=False`` it is the second.
        name: Distinguishes two such callbacks in checkpoints.
        summary: See :class:`OptimCallback`.

    Raises:
        ValueError: If ``terms`` has something else than such penalties, or one with an ``on=`` or ``exclude=`` of its
            own; if ``on`` is none of these, or matches no module (in ``on_fit_start``).
        MisconfigurationException: Under LBFGS, whose line search needs the penalty in the loss (in ``on_fit_start``);
            in the first step, if a module returns no tensor, or if its output is changed in place afterwards.

    Example::

        >>> from lightning_optim import L1, ActivationRegularization
        >>> ActivationRegularization(L1(1e-5), on="encoder.*")
        ActivationRegularization(L1(1e-05), 'encoder.*')
        >>> ActivationRegularization(L1(1e-5), on=torch.nn.ReLU).terms
        [L1(1e-05)]

    For a Trainer: ``Trainer(callbacks=[ActivationRegularization(L1(1e-5), on="encoder.*")])``.
    """

    def __init__(
        self, terms: Penalty | list[Penalty], on: ModuleSelectors, name: str | None = None, summary: bool = True
    ) -> None:
        super().__init__(name, summary)
        self.terms = list(terms) if isinstance(terms, list | tuple) else [terms]
        self.on = check_module_selectors("on", on)
        _check(self.terms, terms)
        self.reset()

    @property
    def identity(self) -> dict[str, Any]:
        return {"terms": [term.identity for term in self.terms], "on": described(self.on)}

    @property
    def needs_total(self) -> bool:
        return any(term.scheduled for term in self.terms)

    def reset(self) -> None:
        self._names: list[str] = []
        self._hooks: list[PenalizedOutputs] = []
        self._watched: WeakSet[nn.Module] = WeakSet()
        self._when: dict[str, Any] = {}  # step and total, for schedules
        self._loss_gradient: Tensor | None = None
        self._any_backward = False
        self._values: dict[str, Tensor] = {}  # of the batch, if it is logged
        self._watches_first_epoch = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        refuse_line_search(self, trainer)
        self.session.on_loss(self, self._arrived)
        self._names = names_beside(self, ActivationRegularization, trainer.callbacks)
        self.session.on_close(partial(compile_again, pl_module))
        self._watch_modules(pl_module, required=True)

    def _watch_modules(self, pl_module: LightningModule, required: bool) -> None:
        """Add a hook to each chosen module that has none yet."""
        found = select_modules(pl_module, self.on, required=required)
        new = {name: module for name, module in found.items() if module not in self._watched}
        for name, module in new.items():
            self._hooks.append(PenalizedOutputs(name, self))
            self.session.on_close(module.register_forward_hook(self._hooks[-1]).remove)
            self._watched.add(module)
        if new:
            compile_again(pl_module)

    def describe_run(self) -> str:
        count = len(self._hooks)
        terms = " + ".join(term.in_words for term in self.terms)
        return f"{terms} on the outputs of {count} module{'' if count == 1 else 's'}"

    # ---- in a batch --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # a layer that was replaced, such as a new head
            self._watch_modules(pl_module, required=False)
        self._when = {"step": self.steps[0] if self.steps else 0, "total": self.session.total}
        logged = self.logs_now(trainer) and not _splits_outputs(trainer)
        # Also where nothing is penalized in this batch: the mean over ranks is a collective.
        self._values = {name: torch.zeros((), device=pl_module.device) for name in self._names} if logged else {}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loss_gradient = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, value in self._values.items():
            pl_module.log(
                f"regularization/activations/{name}",
                value,
                on_step=True,
                on_epoch=False,
                sync_dist=trainer.world_size > 1,
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        called = [hook for hook in self._hooks if hook.called]
        # Weights that are frozen now may be unfrozen in a later epoch.
        missed = [hook.name for hook in called or self._hooks if not hook.reached and not hook.frozen]
        watched, self._watches_first_epoch = self._watches_first_epoch, False
        if watched and missed and self._any_backward and not trainer.fast_dev_run:
            rank_zero_warn(
                f"ActivationRegularization has penalized no output of {shown(missed)} in the first epoch: no loss"
                " depends on it, or the model does not call the module. Name other modules, or remove `detach()` and"
                " `torch.no_grad()` after them."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        frozen = [hook.name for hook in self._hooks if hook.frozen]
        if frozen and self._any_backward and not any(hook.reached for hook in self._hooks):
            rank_zero_warn(
                f"ActivationRegularization has penalized no output in this fit: the weights of {shown(frozen)}, and of"
                " what comes before, are frozen. Name modules that are trained."
            )
        super().on_train_end(trainer, pl_module)

    # ---- in a backward pass: see `OutputPenalty` ---------------------------------------------------------------------

    def _arrived(self, loss: Tensor, grad: Tensor) -> None:
        self._loss_gradient, self._any_backward = grad.detach().reshape(()), True

    @property
    def acts(self) -> bool:
        return self.fit is not None and self.fit.trainer.training

    @property
    def loss_gradient(self) -> Tensor | None:
        return self._loss_gradient

    def add_slope_(self, output: Tensor, slope: Tensor) -> None:
        add_grads_(self.terms, [output], [slope], **self._when)

    def note(self, output: Tensor, batch_size: int) -> None:
        # The second pass of SharpnessAwareMixin is at other weights than those of the step.
        if self._values and not getattr(self.session.trainer.lightning_module, "second_pass", False):
            for name, term in zip(self._names, self.terms, strict=True):
                value = term.value([output], **self._when) / batch_size
                self._values[name] = self._values[name] + value.to(self._values[name].device)

    def __getstate__(self) -> dict[str, Any]:
        of_fit: dict[str, Any] = {"_hooks": [], "_watched": (), "_values": {}, "_when": {}, "_loss_gradient": None}
        return {**super().__getstate__(), **of_fit}


def _check(terms: list[Penalty], given: Any) -> None:
    """Raise if the terms are not penalties that act element by element, on what `on=` of the callback chooses."""
    if not terms or not all(isinstance(term, Penalty) for term in terms):
        raise ValueError(
            f"`terms` must be a penalty such as L1(1e-5), or a list of them, got {given!r}{belongs_to(given, Penalty)}"
        )
    for term in terms:
        term.check_complete()
        if not is_elementwise(term) or term.state_dict():
            raise ValueError(
                f"`terms` must act on each element by itself, as L1, L2 and ElasticNet do, got {term!r}: add another"
                " penalty on outputs to the loss, with RegularizationMixin"
            )
        if term.on is not None or term.exclude is not None:
            raise ValueError(
                f"`terms` must not choose parameters, got {term!r}: remove its `on=` and `exclude=`, and choose modules"
                " with `on=` of ActivationRegularization"
            )


def _splits_outputs(trainer: Trainer) -> bool:
    """Return True if a process may hold a part of an output: under tensor parallelism."""
    strategy = trainer.strategy
    return isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1
