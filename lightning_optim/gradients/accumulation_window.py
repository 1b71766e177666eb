"""Count and weigh the micro-batches of an accumulation window."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.base.construction import written
from lightning_optim.base.dtypes import widest_dtype
from lightning_optim.gradients.target_batch_size import TargetBatchSize
from lightning_optim.runtime.lightning import MisconfigurationException, ModelParallelStrategy, Trainer
from lightning_optim.runtime.lightning.data_loading import batch_size_of

# A YAML parser compares the annotation of a function's result with this one, and most functions have none.
WeightBy: TypeAlias = Literal["batch", "sample"] | Callable[[Any], Any]


@dataclass
class Window:
    """Micro-batches of one optimizer step that are accumulated so far.

    Attributes:
        size: N, fixed when the window opens.
        count: Number of micro-batches whose gradients are accumulated.
        scale: Loss scale of these gradients.
        unit: Weight that is taken for 1, equal on all ranks; ``None`` if all micro-batches weigh the same.
        total: Sum of the weights on this rank, in units.
        holds_grads: True if a parameter had a gradient after a micro-batch of it.
        is_weighed: True if the sum over all ranks is not 0, a scalar on the device; known after :meth:`correction`.
    """

    size: int
    count: int = 0
    scale: float = 1.0
    unit: Tensor | None = None
    total: Tensor | None = None
    holds_grads: bool = False
    is_weighed: Tensor | None = None

    def weigh(self, weight: Tensor, unit: Tensor) -> Tensor:
        """Add the weight of a micro-batch, and return the factor for its loss.

        The factor is relative to ``unit``, so that scaled gradients in half precision stay as large as without weights.
        :meth:`correction` divides by the sum of the factors at the step.
        """
        self.unit = unit if self.unit is None else self.unit
        factor = weight / self.unit
        self.total = factor if self.total is None else self.total + factor
        return factor

    def correction(self, ranks: int) -> Tensor | float:
        r"""Return the factor for the gradients at the step, which makes them the weighted mean.

        Each loss was divided by ``size``, so without weights it is N / count, which is 1 for a full window. With
        weights it is :math:`N R / \sum_{r, i} w_{r, i}` over R ranks, whose gradients are averaged.
        """
        if self.total is None:
            return self.size / self.count
        total = self.total.clone()
        if ranks > 1:
            dist.all_reduce(total)
        self.is_weighed = total > 0
        return torch.where(self.is_weighed, self.size * ranks / total, 1.0)


def weight_of(batch: Any, weight_by: WeightBy, device: torch.device) -> Tensor:
    """Return the weight of a micro-batch, a scalar on the device, without waiting for a tensor that is there.

    Raises:
        RuntimeError: If ``weight_by`` raises an exception, which is its cause.
        ValueError: If the weight is not one number >= 0. A tensor on another device than the CPU is not read.
    """
    argument = argument_of(weight_by)
    try:
        weight = batch_size_of(batch) if isinstance(weight_by, str) else weight_by(batch)
    except Exception as error:
        raise RuntimeError(
            f"{argument} could not weigh a batch of the type {type(batch).__name__}: {type(error).__name__}: {error}"
        ) from error
    if (
        isinstance(weight, Tensor)
        and weight.numel() == 1
        and (weight.device.type != "cpu" or _is_weight(weight.item()))
    ):
        return weight.detach().to(device, widest_dtype(device)).reshape(())
    if isinstance(weight, bool | Tensor) or not _is_weight(weight):
        given = reprlib.repr(weight)
        if shape := getattr(weight, "shape", ()):
            given = f"a {type(weight).__name__} of shape {tuple(shape)}; did you mean `.sum()`?"
        raise ValueError(f"{argument} must return a number >= 0 or a tensor with one element, got {given}")
    return torch.full((), float(weight), device=device, dtype=widest_dtype(device))


def name_of(weight_by: WeightBy) -> str:
    """Return a word for the ``weight_by`` argument: a name, or "a function" for one without a name.

    Example::

        >>> name_of("sample"), name_of(len), name_of(lambda batch: 1)
        ('sample', 'len', 'a function')
    """
    if isinstance(weight_by, str):
        return weight_by
    name: str = getattr(weight_by, "__name__", "")
    text = name or written(weight_by)
    if " at 0x" in text:
        return type(weight_by).__name__
    return "a function" if "<lambda>" in text else text


def argument_of(weight_by: WeightBy) -> str:
    """Return the ``weight_by`` argument as it is written, for a message."""
    name = name_of(weight_by)
    return f"`GradientAccumulation(weight_by={repr(name) if isinstance(weight_by, str) else name})`"


def _is_weight(number: Any) -> bool:
    return isinstance(number, numbers.Real) and 0 <= float(number) < math.inf


def unit_of(weight: Tensor, ranks: int, before: Tensor | None) -> Tensor:
    """Return the unit of a window: the mean over ranks of its first weight, or ``before`` if that mean is 0."""
    unit = weight.clone()
    if ranks > 1:
        dist.all_reduce(unit)
    return torch.where(unit > 0, unit / ranks, 1.0 if before is None else before)


def micro_batches_for(target: TargetBatchSize, trainer: Trainer) -> tuple[int, int]:
    """Return the micro-batches in a step, and its samples, for a Trainer whose training data are loaded."""
    size, ranks = target.micro_batch_size or _loader_batch_size(trainer), _data_ranks(trainer)
    count = target.micro_batches(size, ranks)
    return count, count * size * ranks


def _loader_batch_size(trainer: Trainer) -> int:
    loader = trainer.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
    if not isinstance(size, int):
        raise MisconfigurationException(
            f"TargetBatchSize finds no `batch_size` on the training data ({type(loader).__name__}): pass the number of"
            " samples in a rank's micro-batch, as in `TargetBatchSize(256, micro_batch_size=32)`."
        )
    return size


def _data_ranks(trainer: Trainer) -> int:
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return int(strategy.device_mesh["data_parallel"].size())
    return trainer.world_size
