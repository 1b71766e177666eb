"""Estimate how much each weight matters for what a module has learned: the diagonal of the Fisher information."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_optim.base.arguments import check_number
from lightning_optim.base.dtypes import real_zeros_like
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.base.shards import any_sharded
from lightning_optim.runtime.lightning import LightningModule
from lightning_optim.runtime.lightning.data_loading import training_step_arguments
from lightning_optim.runtime.lightning.log_interception import intercept_log
from lightning_optim.runtime.lightning.torch_internals import uncompiled
from lightning_optim.runtime.loss_gradients import loss_in
from lightning_optim.runtime.object_state import ObjectState
from lightning_optim.runtime.random_state import isolated_random_state

_VALUES = (str, bytes, int, float, bool)


def fisher_importance(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    samples: int | None = None,
) -> dict[str, Tensor]:
    r"""Return how much each weight matters: :math:`\frac1n \sum_i g_i^2`, the mean of its squared gradients by sample.

    It is the diagonal of the empirical Fisher information, if the loss is a negative log-likelihood such as the cross
    entropy. Batches are split into samples, since the square of a mean gradient is not the mean of the squares. The
    module is in eval mode, and afterwards it is as before, with its gradients, buffers and metrics; it logs nothing.
    In :class:`L2SP` it protects a task that was learned before: elastic weight consolidation (Kirkpatrick et al.,
    *Overcoming catastrophic forgetting in neural networks*, `arXiv:1612.00796 <https://arxiv.org/abs/1612.00796>`_).

    Args:
        module: The trained module, not sharded.
        batches: Batches of the data that it was trained on, such as its loader. Tensors are moved to the device of the
            module. All tensors of a batch have the samples in their first dimension.
        loss: A function of the module and a batch of one sample that returns a scalar. Default: the module's
            ``training_step``, as a LightningModule with automatic optimization has it.
        samples: The number of samples, the first ones of ``batches``. Default: all. A few hundred are often enough.

    Returns:
        A tensor for each trainable parameter, by its name, with its shape and on its device, in fp32 or better.

    Raises:
        ValueError: If ``samples`` is not an integer >= 1, there is no batch, a batch cannot be split, the loss is not a
            scalar with a gradient, or the module is sharded or has no ``training_step`` that can be used.

    Example::

        >>> module = nn.Linear(1, 1, bias=False)
        >>> inputs, targets = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
        >>> nn.init.ones_(module.weight) is module.weight
        True
        >>> squared_error = lambda module, batch: (module(batch[0]) - batch[1]).square().sum() / 2
        >>> fisher_importance(module, [(inputs, targets)], squared_error)  # the gradients are 1 and 4
        {'weight': tensor([[8.5000]])}

    For a Trainer, whose fit on new data begins with the module as it is now::

        importance = fisher_importance(model, first_loader)
        term = L2SP(100.0, importance=importance, on="*")
        trainer = Trainer(callbacks=[WeightRegularization(term)])
        trainer.fit(model, second_loader)
    """
    check_number("samples", 1 if samples is None else samples, low=1, integer=True)
    weights = {plain_name(name): weight for name, weight in module.named_parameters() if weight.requires_grad}
    if any_sharded(weights.values()):
        raise ValueError("The module is sharded: load its weights into a module without sharding, and pass that one.")
    module = uncompiled(module)
    loss_of = _training_loss(module) if loss is None else loss
    sums = {name: real_zeros_like(weight) for name, weight in weights.items()}
    device = next((weight.device for weight in weights.values()), torch.device("cpu"))
    state, count = ObjectState({"module": module}), 0
    state.set_gradients_aside()
    try:
        with (
            isolated_random_state(),
            intercept_log(cast(LightningModule, module)),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            module.eval()
            for sample in _samples(batches, samples, device):
                count += 1
                slopes = _slopes(loss_of(module, sample), list(weights.values()))
                for total, slope in zip(sums.values(), slopes, strict=True):
                    if slope is not None:
                        total.add_(slope.abs().to(total.dtype).square_())
    finally:
        state.restore_()
        state.return_gradients()
    if not count:
        raise ValueError("`batches` is empty: pass at least one batch")
    return {name: total.div_(count) for name, total in sums.items()}


def _training_loss(module: nn.Module) -> Callable[[Any, Any], Any]:
    """Return a function that calls ``training_step`` for a loss."""
    kind = type(module).__name__
    if not isinstance(module, LightningModule):
        raise ValueError(f"{kind} is no LightningModule: pass `loss`, a function of module and batch")
    if not module.automatic_optimization:
        raise ValueError(
            f"`training_step` of {kind} optimizes by itself, and would move the weights: pass `loss`, a function of"
            " module and batch"
        )

    def loss_of(module: Any, batch: Any) -> Any:
        return loss_in(module.training_step(*training_step_arguments(module, batch, 0)))

    return loss_of


def _slopes(loss: Any, weights: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradient of a loss, ``None`` for a weight that it does not depend on; ``.grad`` stays as it is."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"The loss of a sample must be a scalar tensor that depends on trainable weights, got {got}")
    return torch.autograd.grad(loss.reshape(()), weights, allow_unused=True)


# ---- samples ---------------------------------------------------------------------------------------------------------


def _samples(batches: Iterable[Any], most: int | None, device: torch.device) -> Iterator[Any]:
    """Yield batches of one sample each, on the device."""
    left = math.inf if most is None else most
    for batch in batches:
        size = _size_of(batch)
        if size is None:
            raise _not_split(batch)
        for place in range(size):
            if not left:
                return
            yield _sample(batch, place, size, device)
            left -= 1


def _size_of(batch: Any) -> int | None:
    """Return the first dimension of the first tensor that has one."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((size for size in map(_size_of, parts) if size is not None), None)


def _sample(batch: Any, place: int, size: int, device: torch.device) -> Any:
    """Return one of the ``size`` samples of a batch, as a batch of one."""
    if isinstance(batch, Tensor):
        if batch.ndim and len(batch) != size:
            raise _not_split(batch)
        return (batch[place : place + 1] if batch.ndim else batch).to(device)
    if isinstance(batch, Mapping):
        return {key: _sample(value, place, size, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        if batch and len(batch) == size and all(isinstance(value, _VALUES) for value in batch):
            return type(batch)([batch[place]])
        parts = [_sample(value, place, size, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if batch is None or size == 1 or isinstance(batch, _VALUES):
        return batch
    raise _not_split(batch)


def _not_split(batch: Any) -> ValueError:
    got = f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
    return ValueError(
        "A batch must consist of tensors with the samples in their first dimension, in lists, tuples or dictionaries,"
        f" so that it can be split into samples, got {got}: let the loader make batches of one sample"
    )
