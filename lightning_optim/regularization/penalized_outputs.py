"""Add the gradient of a penalty to that of a module's output: a forward hook."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_optim.base.dtypes import accumulation_dtype
from lightning_optim.base.shards import local_shards, placed_as
from lightning_optim.runtime.lightning import MisconfigurationException
from lightning_optim.runtime.lightning.torch_internals import tree_leaves, tree_map_only

_FIRST_OF_SEVERAL = (nn.RNNBase, nn.MultiheadAttention)  # the other outputs repeat the first, or are its weights


class OutputPenalty(Protocol):
    """The penalty as the hook on a module sees it."""

    @property
    def acts(self) -> bool:
        """True if the outputs that are computed now are those of a training step."""

    @property
    def loss_gradient(self) -> Tensor | None:
        """Gradient that arrived at the loss of the running backward pass; ``None`` outside of one."""

    def add_slope_(self, output: Tensor, slope: Tensor) -> None:
        """Add the derivative of the penalty for one element of the batch, in place."""

    def note(self, output: Tensor, batch_size: int) -> None:
        """Take an output whose backward pass is running, to log its penalty."""


class PenalizedOutputs:
    """Forward hook that adds the gradient of a penalty, over the batch size, to that of each tensor of an output.

    It is added in the backward pass, where the gradient of the output arrives, times the gradient that arrived at the
    loss. So it is weighted as the loss is, and added once where activation checkpointing computes the output again.

    Args:
        name: The module's name, for messages.
        penalty: The penalty.

    Attributes:
        called: True if the module has been called in a training step.
        reached: True if a backward pass has reached an output.
        frozen: True if the latest output needs no gradient, as that of frozen weights.
    """

    def __init__(self, name: str, penalty: OutputPenalty) -> None:
        self.name, self.penalty = name, penalty
        self.called = self.reached = self.frozen = False
        # `torch.compile` leaves it as it is: what it reads is known in the backward pass alone.
        self._outside_of_graphs = torch.compiler.disable(self._act)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle it with a penalty that is in no fit, and so does not act."""
        return PenalizedOutputs, (self.name, self.penalty)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output, each tensor of it with the penalty in its backward pass."""
        return self._outside_of_graphs(module, output)

    def _act(self, module: nn.Module, output: Any) -> Any:
        if not self.penalty.acts or not torch.is_grad_enabled():
            return output
        self.called = True
        self.frozen = not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output))
        batch_dim = 0 if getattr(module, "batch_first", True) else 1
        if isinstance(module, _FIRST_OF_SEVERAL):
            return (self._penalized(output[0], batch_dim), *output[1:])
        return self._penalized(output, batch_dim)

    def _penalized(self, output: Any, batch_dim: int) -> Any:
        if isinstance(output, PackedSequence):
            size = int(output.batch_sizes[0])  # on the CPU, always
            return output._replace(data=self._one(output.data, size))
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            raise MisconfigurationException(
                f"ActivationRegularization penalizes tensors, and {self.name!r} returns {type(output).__name__}: name a"
                " module inside it whose output is a tensor, or tensors in a tuple, list or dictionary."
            )
        done: dict[int, Tensor] = {}  # a tensor may be in a structure twice

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = self._one(tensor, tensor.shape[batch_dim] if tensor.ndim > batch_dim else 0)
            return done[id(tensor)]

        return tree_map_only(Tensor, once, output)

    def _one(self, output: Tensor, batch_size: int) -> Tensor:
        if not output.requires_grad or not batch_size or not output.numel():
            return output
        penalized: Tensor = _Penalized.apply(output, batch_size, self)  # type: ignore[no-untyped-call]
        return penalized


class _Penalized(torch.autograd.Function):
    """Return the output; its gradient gets the derivative of the penalty, times the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, batch_size: int, hook: PenalizedOutputs) -> Tensor:
        ctx.save_for_backward(output)
        ctx.batch_size, ctx.hook = batch_size, hook
        # An alias: torch refuses to write in place to the input itself, or to a view of it, also after the last use.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        loss_gradient = ctx.hook.penalty.loss_gradient
        if loss_gradient is None:  # a gradient that `training_step` computes itself, say
            return grad, None, None
        ctx.hook.reached = True
        with torch.no_grad():
            output = _saved(ctx)
            [own] = local_shards([output])
            own = own.to(accumulation_dtype(own.dtype))
            slope = torch.zeros_like(own)
            ctx.hook.penalty.add_slope_(own, slope)
            slope.mul_((loss_gradient.to(slope.device) / ctx.batch_size).to(slope.dtype))
            ctx.hook.penalty.note(output.detach(), ctx.batch_size)
            slope = placed_as(slope, output)
        return (grad.to(slope.dtype) + slope).to(grad.dtype), None, None


def _saved(ctx: Any) -> Tensor:
    """Return the output that was saved, unless something has written to it."""
    try:
        (output,) = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise MisconfigurationException(
            f"The output of {ctx.hook.name!r}, which ActivationRegularization penalizes, is changed in place after the"
            " module has returned it, as by `nn.ReLU(inplace=True)`: name the module that comes after it, or pass"
            " `inplace=False` to that one."
        ) from error
    found: Tensor = output
    return found
