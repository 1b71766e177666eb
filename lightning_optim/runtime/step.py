"""Describe one step of an optimizer to callbacks; drop it; count the steps of a run."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.base import module_tensors, shards, sparse
from lightning_optim.base.norms import total_norm
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.runtime.lightning import GradientAccumulationScheduler, Trainer, rank_zero_info
from lightning_optim.runtime.order import Slot


class OptimizerStep:
    """Describe one step of one optimizer: its number, its learning rates, its weights and their gradients.

    A callback gets it from :meth:`OptimCallback.current_step` in ``on_before_optimizer_step`` and
    ``on_after_optimizer_step``. It is made when the first callback asks, shared by all of them, and dropped after the
    step. Ask for it anew in each hook: then :attr:`parameters`, :attr:`weights` and :attr:`grads` are read anew, since
    another callback may have replaced a gradient, set it to ``None``, added parameters or dropped the step.

    In a hand-written loop, ``OptimizerStep(optimizer)`` reads the optimizer's parameters and their ``grad``.

    Args:
        optimizer: The optimizer that steps.
        index: Its position in ``trainer.optimizers``.
        number: Number of steps that it has taken before this one.
        total: Number of its steps in the whole run, or a function that counts them; ``inf`` if the run has no end.
        logs: True if the values of this step are logged.
        module: The model, which knows the names of the parameters.
        weights: Function that returns the parameters, instead of ``optimizer.param_groups``; for *views*, such as the
            row of one member in parameters that stack an ensemble.
        grads: Function that returns their gradients in the same order, instead of ``parameter.grad``; ``None`` stands
            for a parameter without a gradient.

    Attributes:
        optimizer: The optimizer that steps.
        index: Its position in ``trainer.optimizers``.
        number: Number of steps that it has taken before this one. The ``step`` of a schedule or a policy.
        logs: True if the values of this step are logged (``Trainer(log_every_n_steps=…)``).

    Example::

        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> step = OptimizerStep(torch.optim.SGD([weight], lr=0.1))
        >>> step.grads, step.lr, step.norm()
        ([tensor([3., 4.])], [0.1], tensor(5.))

    A callback for a Trainer that logs how well the gradient and the weights are aligned::

        >>> from lightning_optim import OptimCallback
        >>> class Alignment(OptimCallback):
        ...     def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        ...         step = self.current_step(optimizer)
        ...         if step.logs:
        ...             dots = [(w.detach() * g).sum() for w, g in zip(step.weights, step.grads)]
        ...             self.log_value(pl_module, "alignment", sum(dots), optimizer)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        index: int = 0,
        number: int = 0,
        total: float | Callable[[], float] = math.inf,
        logs: bool = False,
        module: nn.Module | None = None,
        weights: Callable[[], list[Tensor]] | None = None,
        grads: Callable[[], list[Tensor | None]] | None = None,
    ) -> None:
        self.optimizer, self.index, self.number, self.logs = optimizer, index, number, logs
        self._total, self._module, self._weights_source, self._grads_source = total, module, weights, grads
        self._parameters: list[Tensor] | None = None
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None
        self._dense: tuple[list[Tensor], list[Tensor]] | None = None
        self._has_sparse = False
        self._named: list[tuple[Tensor, str]] = []
        self._latest: list[Tensor] = []  # gradients as they were read last, held so that no new tensor gets their `id`
        self._versions: list[int] = []  # versions of the gradients when the norms were computed
        self._norms: dict[float, Tensor] = {}

    def refresh(self) -> None:
        """Read parameters and gradients anew when they are asked for next."""
        self._parameters = self._pairs = self._dense = None

    @property
    def total(self) -> float:
        """Number of this optimizer's steps in the whole run; ``inf`` if the run has no end."""
        return self._total() if callable(self._total) else self._total

    @property
    def lr(self) -> list[float]:
        """Learning rate of each of the optimizer's ``param_groups``."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters of the optimizer, in the order of its ``param_groups``, with a gradient or without."""
        if self._parameters is None:
            self._parameters = self._weights_source() if self._weights_source else parameters_of(self.optimizer)
        return self._parameters

    @property
    def groups(self) -> list[list[Tensor]]:
        """:attr:`parameters` of each of the optimizer's ``param_groups``, in the order of :attr:`lr`."""
        remaining = iter(self.parameters)
        return [list(itertools.islice(remaining, len(group["params"]))) for group in self.optimizer.param_groups]

    @property
    def weights(self) -> list[Tensor]:
        """Parameters that have a gradient, in the order of :attr:`parameters`."""
        return self._read()[0]

    @property
    def grads(self) -> list[Tensor]:
        """Gradients of :attr:`weights`, in the same order: whole, unscaled, averaged over ranks, live.

        They have the placements of their parameters; a sparse gradient is coalesced. Those of another optimizer's
        parameters are never in it. Empty if the step was dropped.
        """
        return self._read()[1]

    @property
    def dense(self) -> tuple[list[Tensor], list[Tensor]]:
        """:attr:`weights` and :attr:`grads` for formulas that know dense tensors only, such as those of policies.

        A sparse gradient is replaced by its values, live, and its weight by a copy of the rows that have a gradient.
        """
        if self._dense is None:
            pairs = self._read()
            self._dense = sparse.dense_rows(*pairs) if self._has_sparse else pairs
        return self._dense

    @property
    def names(self) -> list[str]:
        """Names of :attr:`weights`, as in :attr:`parameter_names`."""
        name_of = dict(zip(map(id, self.parameters), self.parameter_names, strict=True))
        return [name_of[id(weight)] for weight in self.weights]

    @property
    def parameter_names(self) -> list[str]:
        """Names of :attr:`parameters` in the model, without what ``torch.compile`` adds.

        A parameter that the model does not hold is named by its place, such as
        ``"optimizers.0.param_groups.1.params.0"``.
        """
        if [id(parameter) for parameter, _ in self._named] != [id(parameter) for parameter in self.parameters]:
            self._named = list(zip(self.parameters, self._find_names(), strict=True))
        return [name for _, name in self._named]

    def _find_names(self) -> list[str]:
        known: dict[int, str] = {}
        if self._module is not None:
            shards.reshard_(self._module)
            known = module_tensors.parameter_names(self._module)
        return [
            module_tensors.plain_name(known[id(parameter)])
            if id(parameter) in known
            else f"optimizers.{self.index}.param_groups.{number}.params.{place}"
            for number, group in enumerate(self.groups)
            for place, parameter in enumerate(group)
        ]

    @property
    def dropped(self) -> bool:
        """True if no parameter has a gradient, so that the step changes no weight: it was cancelled or dropped."""
        return not any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"])

    def value_of(self, number: float | Schedule) -> float:
        """Return the value at this step of a number or a schedule."""
        return value_at(number, self.number, self.total)

    def norm(self, norm_type: float = 2.0) -> Tensor:
        """Return the norm of all :attr:`grads` together, and compute it only if they changed since it was asked for.

        A change is noticed if a gradient was replaced, or written to in place; a write through ``.data``, which torch
        does not count, is not noticed. With sharded gradients the norm is a collective: call it on all ranks alike.

        Args:
            norm_type: The exponent p > 0; ``inf`` for the largest absolute value.

        Returns:
            A scalar on the device of the first gradient, in fp32 or better, the same on all ranks.
        """
        norm = self.known_norm(norm_type)
        if norm is None:
            norm = self._norms[norm_type] = total_norm(self.dense[1], norm_type)
        return norm

    def known_norm(self, norm_type: float = 2.0) -> Tensor | None:
        """Return :meth:`norm` if it was computed and no gradient changed since, else ``None``."""
        versions = shards.versions(self.grads)
        if versions != self._versions:
            self._norms.clear()
            self._versions = versions
        return self._norms.get(norm_type)

    def _read(self) -> tuple[list[Tensor], list[Tensor]]:
        if self._pairs is None:
            if self._grads_source is None:
                weights, grads, self._has_sparse = _aligned(self.parameters)
            else:
                weights, grads = _having_gradients(self.parameters, self._grads_source())
                self._has_sparse = sparse.any_sparse(grads)
            self._pairs = weights, grads
            before, self._latest = self._latest, self._pairs[1]
            if len(before) != len(self._latest) or not all(map(operator.is_, before, self._latest)):
                self._norms.clear()
        return self._pairs


def gradients_of(optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """Return this optimizer's parameters that have a gradient, and these gradients in the parameters' placement.

    The short form of :attr:`OptimizerStep.weights` and :attr:`OptimizerStep.grads` for hand-written loops. Both lists
    are empty when the step was cancelled or dropped. The gradients of another optimizer's parameters, which may be left
    from an earlier step, are never in the result. A sparse gradient, as ``Embedding(sparse=True)`` makes, is coalesced:
    read and write its ``values()``.

    Example::

        >>> import torch
        >>> weight, frozen = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> weights, grads = gradients_of(torch.optim.SGD([weight, frozen], lr=0.1))
        >>> len(weights), grads
        (1, [tensor([3., 4.])])
    """
    weights, grads, _ = _aligned(parameters_of(optimizer))
    return weights, grads


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters of an optimizer, in the order of its ``param_groups``."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _aligned(parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor], bool]:
    """Return the parameters with a gradient, their aligned gradients, and whether one of these is sparse."""
    weights, grads = _having_gradients(parameters, [parameter.grad for parameter in parameters])
    has_sparse = sparse.any_sparse(grads)
    if has_sparse or shards.any_sharded(grads):
        grads = [grad for weight in weights if (grad := shards.align_grad_(weight)) is not None]
    return weights, grads, has_sparse


def _having_gradients(weights: list[Tensor], grads: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    if type(None) in set(map(type, grads)):  # cheap where hundreds of tensors have a gradient
        weights = [weight for weight, grad in zip(weights, grads, strict=True) if grad is not None]
        grads = [grad for grad in grads if grad is not None]
    return weights, grads


def drop_step(trainer: Trainer, optimizer: Optimizer, reason: str) -> None:
    """Drop the step that ``optimizer`` is about to take; call it in ``on_before_optimizer_step``, on all ranks alike.

    The optimizer's gradients become ``None``: weights, momentum and step counts of torch's optimizers stay as they are,
    later callbacks have nothing to act on, and ``on_after_optimizer_step`` is not called. ``trainer.global_step`` and a
    learning-rate schedule with ``"interval": "step"`` still advance, since Lightning counts calls.

    Args:
        trainer: The running Trainer.
        optimizer: The optimizer that shall not step.
        reason: A sentence, which is printed.

    Example::

        >>> from lightning_optim import OptimCallback
        >>> class SkipFirst(OptimCallback):
        ...     def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        ...         if trainer.global_step == 0:
        ...             drop_step(trainer, optimizer, "the first batch is not trained on")
    """
    rank_zero_info(f"Step {trainer.global_step} of {type(optimizer).__name__} is dropped: {reason}")
    optimizer.zero_grad(set_to_none=True)


def total_steps(trainer: Trainer) -> int | float:
    r"""Return the number of steps that each optimizer takes in the whole run; ``inf`` if the run has no end.

    It is :math:`\min(\sum_e \lceil B / n_e \rceil,\; \lceil S / O \rceil)` with :math:`B` batches in an epoch,
    :math:`n_e` micro-batches in a step of epoch :math:`e`, :math:`S` = ``max_steps`` and :math:`O` optimizers, each of
    which is assumed to step once in each window. Lightning's ``estimated_stepping_batches`` is wrong where :math:`n`
    changes from epoch to epoch, and does not count the windows of manual optimization.

    Args:
        trainer: A Trainer with a connected model. The training data are loaded if they are not yet.
    """
    optimizers = max(1, len(trainer.optimizers))
    limit = math.inf if trainer.max_steps == -1 else math.ceil(trainer.max_steps / optimizers)
    epochs = trainer.max_epochs
    if epochs is None or epochs == -1:
        return limit
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return limit
    return min(sum(math.ceil(batches / micro_batches(trainer, epoch)) for epoch in range(epochs)), limit)


def micro_batches(trainer: Trainer, epoch: int) -> int:
    """Return the number of micro-batches in one optimizer step of ``epoch``."""
    for callback in trainer.callbacks:
        if getattr(callback, "slot", None) is Slot.ACCUMULATE:
            return callback.batches_per_step(epoch)
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches
