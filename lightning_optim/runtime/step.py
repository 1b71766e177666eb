"""Gradients and counts of optimizer steps."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.base import shards, sparse
from lightning_optim.runtime.lightning import GradientAccumulationScheduler, Trainer, rank_zero_info
from lightning_optim.runtime.order import Slot


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether any parameter of this optimizer has a gradient. If none has, somebody cancelled the step."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def drop_step(trainer: Trainer, optimizer: Optimizer, reason: str) -> None:
    """Drop the step that ``optimizer`` is about to take.

    To be called in ``on_before_optimizer_step``, on all ranks alike. The optimizer's gradients become ``None``:
    weights, momentum and step counts of torch's optimizers stay as they are, later slots see that nothing is left to
    act on, and ``on_after_optimizer_step`` is not called. ``trainer.global_step`` and a step-wise learning-rate
    schedule still advance: Lightning counts calls.

    Args:
        trainer: The running Trainer.
        optimizer: Whose step is dropped.
        reason: A sentence for the log.
    """
    rank_zero_info(f"Step {trainer.global_step} of {type(optimizer).__name__} is dropped: {reason}")
    optimizer.zero_grad(set_to_none=True)


def total_steps(trainer: Trainer) -> int | float:
    r"""The optimizer steps of the whole run, for each optimizer; ``inf`` if there is no end to the run.

    :math:`\min(\sum_e \lceil B / n_e \rceil,\; \lceil S / O \rceil)` with ``B`` batches an epoch, ``n_e`` micro-batches
    a step in epoch ``e``, ``S = max_steps`` and ``O`` optimizers. Lightning's ``estimated_stepping_batches`` is wrong
    where ``n`` changes from epoch to epoch, and counts no window of manual optimization. Each optimizer is taken to
    step once in each window.

    Args:
        trainer: A Trainer with a connected model. Loads the training data if that has not happened yet.
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
    """The number of micro-batches in one optimizer step of ``epoch``."""
    for callback in trainer.callbacks:
        if getattr(callback, "slot", None) is Slot.ACCUMULATE:
            return callback.batches_per_step(epoch)
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def gradients_of(optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """This optimizer's parameters that have a gradient, and these gradients in the parameters' placement.

    Both lists are empty when the step was cancelled or dropped. The gradients of another optimizer's parameters lie
    around stale: they are never in the result. A sparse gradient, as ``Embedding(sparse=True)`` makes, is coalesced:
    its ``values()`` are what is read and written.
    """
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grads = [weight.grad for weight in weights]
    if type(None) in set(map(type, grads)):  # a question that costs little where hundreds of tensors have a gradient
        weights = [weight for weight, grad in zip(weights, grads, strict=True) if grad is not None]
        grads = [grad for grad in grads if grad is not None]
    if shards.any_sharded(grads) or sparse.any_sparse(grads):
        grads = [shards.align_grad_(weight) for weight in weights]
    return weights, grads
