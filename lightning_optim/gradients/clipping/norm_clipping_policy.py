"""Define the base class of clipping by a bound on a norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.base.dtypes import without_autocast
from lightning_optim.base.norms import tensor_norms, total_norm
from lightning_optim.base.selection import Selectors
from lightning_optim.gradients.clipping.clipping_policy import Clipping, Scope, by_device


class NormClipping(Clipping):
    r"""Scale gradients so that a norm is at most a bound :math:`c`: :math:`g \cdot \min(1, c / (n + 10^{-6}))`.

    A new one is a subclass with ``_bound``, which computes the bound from the norms::

        >>> class ToMean(NormClipping):
        ...     '''Make no norm larger than the mean of all tensors' norms.'''
        ...     def _bound(self, norms):
        ...         return norms.nanmean()
        >>> grads = [torch.tensor([3.0]), torch.tensor([5.0])]
        >>> ToMean(scope="tensor").clip_(grads)
        tensor(5.8310)
        >>> grads
        [tensor([3.]), tensor([4.0000])]

    Args:
        norm_type: Exponent p > 0 of the norm; ``inf`` for the largest absolute value.
        scope: Parts with a norm and a bound of their own: ``"global"``, all gradients of an optimizer together, which
            keeps the direction of the step; ``"group"``, each of its ``param_groups``; ``"tensor"``, each tensor.
        on: The parameters on whose gradients it acts: a glob over names, a module class, a predicate, or a list of
            these. Default: all.
        exclude: The parameters that are left out, in the same terms.

    For a Trainer: ``Trainer(callbacks=[GradientClipping(ToMean())])``.
    """

    identity_args = ("on", "exclude", "norm_type", "scope")
    formulas = (("_bound", "bound", "clip_"),)
    _factors: Tensor | None = None
    _last_bound: Tensor | float | None = None

    def __init__(
        self, norm_type: float = 2.0, scope: Scope = "global", on: Selectors = None, exclude: Selectors = None
    ) -> None:
        super().__init__(on, exclude)
        self.norm_type = check_number("norm_type", norm_type, low=0.0, low_open=True, high=math.inf)
        self.scope = check_choice("scope", scope, Scope)

    def _bound(self, norms: Tensor) -> Tensor | float:
        """Return the bound on each of ``norms``; to be overridden.

        Args:
            norms: A vector with one entry for each unit of the scope; NaN for a unit that has no gradient in
                this step, and infinite or NaN where a gradient is: a state should not take these in. It grows when
                the optimizer gets more parameters, and with it each state :func:`~lightning_optim.base.per_unit`.

        Returns:
            A vector as long as ``norms``, or a number; ``inf`` for no bound. A bound equal to the norm still makes the
            gradients a little smaller, since they are divided by the norm plus 1e-6.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `_bound(self, norms)`")

    def bound(self, norms: Tensor, *, step: int = 0, total: float = math.inf) -> Tensor | float:
        """Return the bound on each of ``norms``, and remember them. It is called once in each step."""
        self._at(step, total)
        self._grow(len(norms), norms)
        return self._bound(norms)

    @torch.no_grad()
    @without_autocast
    def clip_(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor] = (),
        *,
        norm: Tensor | None = None,
        step: int = 0,
        total: float = math.inf,
        units: Sequence[int] = (),
    ) -> Tensor:
        if not grads:
            return torch.zeros(()) if norm is None else norm
        if self.scope == "global":
            norm = total_norm(grads, self.norm_type) if norm is None else norm
            norms = norm.reshape(1)
        else:
            each = tensor_norms(grads, self.norm_type)
            norm = torch.linalg.vector_norm(each, self.norm_type) if norm is None else norm
            units = range(len(grads)) if self.scope == "tensor" and not units else units
            count = max([self._known_units(), *(unit + 1 for unit in units)])
            norms = _by_unit(each, units, count, self.norm_type)
        self._last_bound = self.bound(norms, step=step, total=total)
        factors = torch.clamp(self._last_bound / (norms + 1e-6), max=1.0)
        self._factors = factors
        if self.scope == "global":
            for device, some_grads in by_device(grads).items():
                torch._foreach_mul_(some_grads, factors[0].to(device))
        else:
            unbound, locals_ = factors.unbind(), shards.local_shards(grads)
            mine = [unbound[unit].to(shard.device) for unit, shard in zip(units, locals_, strict=True)]
            torch._foreach_mul_(locals_, mine)
        return norm

    @property
    def factors(self) -> Tensor | None:
        return self._factors

    @property
    def clipped(self) -> Tensor | None:
        return None if self._factors is None else (self._factors < 1.0).any()

    def bound_in_force(self, *, step: int = 0, total: float = math.inf) -> Tensor | float | None:
        bound = self._last_bound if self.scope == "global" else None
        return bound.reshape(-1)[0] if isinstance(bound, Tensor) else bound

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_factors": None, "_last_bound": None}


def _by_unit(each: Tensor, units: Sequence[int], count: int, norm_type: float) -> Tensor:
    """Return the norm of each of ``count`` units, from the tensors' norms; NaN for a unit without a gradient."""
    if len(units) != len(each):
        raise ValueError(f"`units` must name the unit of each of {len(each)} gradients, got {units!r}")
    by_unit: list[list[Tensor]] = [[] for _ in range(count)]
    for unit, norm in zip(units, each.unbind(), strict=True):
        by_unit[unit].append(norm)
    nothing = each.new_full((), math.nan)

    def together(own: list[Tensor]) -> Tensor:
        if len(own) < 2:
            return own[0] if own else nothing
        return torch.linalg.vector_norm(torch.stack(own), norm_type)

    return torch.stack([together(own) for own in by_unit])
