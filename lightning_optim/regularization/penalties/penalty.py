"""Define the base class of penalties: terms of the loss that depend on the weights alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.base import foreach, shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.dtypes import accumulation_dtype, without_autocast
from lightning_optim.base.policy import ParameterPolicy
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors


class Penalty(ParameterPolicy):
    """Base class of terms of the loss that depend on the weights alone. They act before the optimizer step.

    The gradient is added in closed form, so it needs no autograd graph and no factor for accumulation or a loss scale:
    it is added once per optimizer step, to gradients that are whole and unscaled.

    A new penalty is a subclass with ``_value`` and ``_add_grad_``, the formula and its derivative::

        >>> from lightning_optim.base import local_shards
        >>> class Sum(Penalty):
        ...     '''The sum of all weights.'''
        ...     def _value(self, weights):
        ...         return sum(weight.sum() for weight in weights)
        ...     def _add_grad_(self, weights, grads):
        ...         torch._foreach_add_(local_shards(grads), 1.0)
        >>> weight, grad = torch.tensor([1.0, 2.0]), torch.zeros(2)
        >>> Sum().add_grad_([weight], [grad])
        >>> Sum().value([weight]), grad
        (tensor(3.), tensor([1., 1.]))

    Args:
        on: The parameters that are penalized, for :func:`~lightning_optim.base.select`; ``None`` takes those with two
            dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    For a Trainer: ``Trainer(callbacks=[WeightRegularization(Sum())])``. A function of one weight needs no class, see
    :meth:`from_function`.
    """

    used_in = "WeightRegularization({})"
    decays: bool = False
    """True if it pulls each weight towards zero in proportion to the weight, as an optimizer's weight decay does."""
    elementwise: ClassVar[bool] = False
    """True if the gradient of each element depends on this element alone: then several penalties share one pass."""
    formulas = (("_value", "value"), ("_add_grad_", "add_grad_"))

    @staticmethod
    def from_function(
        f: Callable[[Tensor], Any],
        strength: float | Schedule = 1.0,
        on: Selectors = None,
        exclude: Selectors = None,
    ) -> Penalty:
        r"""Make a penalty of any differentiable function of a weight: :math:`s \sum_w f(w)`, its gradient by autograd.

        It is logged under the name of the function. A class with a gradient in closed form is faster, and uses less
        memory: autograd keeps what ``f`` computes on one weight at a time.

        Args:
            f: Called with each whole weight, in fp32 or better; a sharded one is gathered, and of stacked ensemble
                members each by itself. It returns a real scalar tensor that autograd can follow back to the weight.
            strength: The factor :math:`s \ge 0`. Default 1, for a function that has a factor of its own.
            on: The parameters that are penalized, as in :class:`L1`. Default: those with two dimensions or more.
            exclude: The parameters that are left out, in the same terms.

        Raises:
            ValueError: If ``f`` is no function, or ``strength`` is not a number >= 0 or a schedule of such numbers; at
                the first step, before it moves a weight, if ``f`` returns no real scalar, or one that does not depend
                on the weight.

        Example::

            >>> def correlated_rows(w):
            ...     rows = torch.nn.functional.normalize(w, dim=1)
            ...     return (rows @ rows.T).triu(1).abs().mean()
            >>> penalty = Penalty.from_function(correlated_rows, 0.1, on="encoder.*.weight")
            >>> penalty
            Penalty.from_function(correlated_rows, strength=0.1, on='encoder.*.weight')
            >>> weight, grad = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.zeros(2, 2)
            >>> penalty.add_grad_([weight], [grad])
            >>> penalty.value([weight]), grad
            (tensor(0.0150), tensor([[ 0.0000,  0.0200],
                    [ 0.0160, -0.0120]]))
            >>> callback = WeightRegularization(penalty)  # for Trainer(callbacks=[callback])
        """
        return FunctionPenalty(f, strength, on, exclude)

    @without_autocast
    def value(self, weights: Sequence[Tensor], *, step: int = 0, total: float = math.inf) -> Tensor:
        """Return the penalty: a scalar in fp32 or better on the device of the first weight, the same on all ranks.

        Args:
            weights: Tensors of any shape, plain or DTensors.
            step: Number of optimizer steps made before, for schedules.
            total: Number of optimizer steps in the run, for schedules.
        """
        self._at(step, total)
        return self._value(weights)

    @torch.no_grad()
    @without_autocast
    def add_grad_(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], *, step: int = 0, total: float = math.inf
    ) -> None:
        """Add the derivative of :meth:`value` to the gradients, in place.

        Args:
            weights: Tensors of any shape, plain or DTensors.
            grads: Their gradients, in the same order and with the same placements.
            step: Number of optimizer steps made before, for schedules.
            total: Number of optimizer steps in the run, for schedules.
        """
        if weights:
            self._at(step, total)
            self._add_grad_(weights, grads)

    def _value(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the penalty; to be overridden."""
        raise NotImplementedError(f"{type(self).__name__} has no `_value(self, weights)`")

    def _add_grad_(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Add the derivative to the gradients in place; to be overridden. There is at least one weight."""
        raise NotImplementedError(f"{type(self).__name__} has no `_add_grad_(self, weights, grads)`")


class FunctionPenalty(Penalty):
    """Penalize a function of each weight; :meth:`Penalty.from_function` makes it."""

    identity_args = ("function", "on", "exclude")
    needs = "matrices"
    gathers = True

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        strength: float | Schedule = 1.0,
        on: Selectors = None,
        exclude: Selectors = None,
    ) -> None:
        if not callable(f):
            raise ValueError(f"`f` must be a function of a weight that returns a scalar tensor, got {f!r}")
        self.f = f
        self.strength = check_number("strength", strength, low=0.0, schedule=True)
        super().__init__(on, exclude)

    @property
    def log_name(self) -> str:
        name = self.function.rpartition(".")[2]
        return name if name.isidentifier() else "function"

    @property
    def function(self) -> str:
        """The name of the function, or of the class of an object, the same in every process."""
        function: Any = self.f
        while isinstance(function, partial):
            function = function.func
        return str(getattr(function, "__qualname__", type(function).__qualname__.lower()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the name of this file, so that the class can be moved."""
        made = methodcaller("from_function", self.f, self.strength, self.on, self.exclude)
        return made, (Penalty,), self.__dict__

    def _call(self, named: list[bool]) -> str:
        return super()._call(named).replace(type(self).__name__, "Penalty.from_function", 1)

    def _value(self, weights: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=weights[0].device if weights else None)
        for weight in weights:
            total = total + self._of(in_full(weight), weight).to(total.device)
        return self.current(self.strength) * total

    def _add_grad_(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        if not (strength := self.current(self.strength)):
            return
        for weight, grad in zip(weights, shards.local_shards(grads), strict=True):
            with torch.enable_grad():
                leaf = in_full(weight).detach().requires_grad_()
                value = self._of(leaf, weight)
            (slope,) = torch.autograd.grad(value, leaf, allow_unused=True) if value.requires_grad else (None,)
            if slope is None:
                raise ValueError(
                    f"`f` of {self!r} must return a tensor that depends on the weight, by operations that autograd"
                    f" follows; for a weight of shape {tuple(weight.shape)} its result has no gradient"
                )
            grad.add_(shards.shard_of(slope, weight), alpha=strength)

    def _of(self, whole: Tensor, weight: Tensor) -> Tensor:
        """Return the value of the function; of stacked ensemble members, the sum of theirs."""
        stacked = getattr(weight, "member_dim", None)
        values = [self.f(one) for one in ([whole] if stacked is None else whole.unbind(stacked))]
        for value in values:
            if not isinstance(value, Tensor) or value.ndim or value.is_complex():
                got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                got = "a complex number" if isinstance(value, Tensor) and not value.ndim else got
                raise ValueError(
                    f"`f` of {self!r} must return a real scalar tensor, such as `(w - 1).square().sum()`; for a weight"
                    f" of shape {tuple(weight.shape)}, got {got}"
                )
        return torch.stack(values).sum() if len(values) > 1 else values[0]


def in_full(weight: Tensor) -> Tensor:
    """Return a whole weight, gathered if it is sharded, in fp32 or better."""
    whole = shards.whole(weight)
    return whole.to(accumulation_dtype(whole.dtype))


@torch.no_grad()
@without_autocast
def add_grads_(
    penalties: Sequence[Penalty],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    step: int = 0,
    total: float = math.inf,
) -> None:
    """Add the derivatives of several penalties on the same weights to the gradients, in place.

    Those that are elementwise add theirs piece by piece, so that weights and gradients are read from memory once.

    Args:
        penalties: The penalties.
        weights: Tensors of any shape, plain or DTensors.
        grads: Their gradients, in the same order and with the same placements.
        step: Number of optimizer steps made before, for schedules.
        total: Number of optimizer steps in the run, for schedules.
    """
    together = [penalty for penalty in penalties if is_elementwise(penalty)]
    if len(together) == 1:
        together = []  # a single one makes its own pieces, if it needs any
    if together:
        for some_weights, some_grads in foreach.chunks(shards.local_shards(weights), shards.local_shards(grads)):
            for penalty in together:
                penalty.add_grad_(some_weights, some_grads, step=step, total=total)
    for penalty in penalties:
        if penalty not in together:
            penalty.add_grad_(weights, grads, step=step, total=total)


def is_elementwise(penalty: Penalty) -> bool:
    """Return :attr:`Penalty.elementwise` of the class that has the formula: a subclass may have another one."""
    definer = next(cls for cls in type(penalty).__mro__ if "_add_grad_" in vars(cls))
    return bool(vars(definer).get("elementwise", False))
