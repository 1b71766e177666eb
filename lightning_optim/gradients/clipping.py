"""Gradient clipping: gradients that are too large are made smaller before the optimizer step."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.norms import tensor_norms, total_norm
from lightning_optim.base.policy import Policy
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.base.selection import Selector

Scope: TypeAlias = Literal["global", "group", "tensor"]


class Clipping(Policy, abc.ABC):
    """What is done to the gradients of one optimizer before its step.

    A new clipping is a subclass with :meth:`clip_`::

        >>> class Sign(Clipping):
        ...     '''Keep the sign of every element.'''
        ...     def clip_(self, grads, weights=(), *, norm=None, step=0, total=math.inf):
        ...         torch._foreach_sign_(shards.local(grads))
        ...         return norm
        >>> grad = torch.tensor([3.0, -4.0])
        >>> Sign().clip_([grad])
        >>> grad
        tensor([ 1., -1.])

    Attributes:
        norm_type: Which norm :meth:`clip_` takes and returns: the exponent p, or ``inf``. Default 2.
        on: The parameters on whose gradients it acts, for :func:`~lightning_optim.base.selection.select`;
            ``None`` takes all.
            In a loop of your own, pass the gradients that you mean.
        exclude: What is left out of them, in the same terms.
        scope: What has a norm of its own: all gradients, each of the optimizer's ``param_groups``, or each tensor.
            Where it is not ``"global"``, the caller passes ``units=`` to :meth:`clip_`: the number of each gradient's
            group, or of its tensor.
        limits: Whether it makes gradients smaller, so that a step is clipped or not.
    """

    identity_args: ClassVar[tuple[str, ...]] = ("on", "exclude")
    norm_type: float = 2.0
    on: Selector | Sequence[Selector] | None = None
    exclude: Selector | Sequence[Selector] | None = None
    scope: Scope = "global"
    limits: ClassVar[bool] = True

    @abc.abstractmethod
    def clip_(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor] = (),
        *,
        norm: Tensor | None = None,
        step: int = 0,
        total: float = math.inf,
    ) -> Tensor | None:
        """Clip the gradients in place.

        Nothing waits for the device: the decision is a factor, and never a branch.

        Args:
            grads: Whole, unscaled gradients of any shape, plain or DTensors, with the placements of their parameters.
            weights: Their parameters, in the same order, for the formulas that need them.
            norm: The norm :attr:`norm_type` of all of ``grads``, if the caller knows it already.
            step: The number of optimizer steps made before, for schedules.
            total: The number of optimizer steps in the run, for schedules.

        Returns:
            The norm before clipping, a scalar on the gradients' device: ``norm`` where it was given, else the one that
            the formula computed. ``None`` if the formula needs no norm and none was given.
        """

    @property
    def clipped(self) -> Tensor | None:
        """Whether the last :meth:`clip_` made anything smaller, a scalar on the device; ``None`` if it does not say."""
        return None

    def is_idle(self, norm: float, *, step: int = 0, total: float = math.inf) -> bool:
        """Whether :meth:`clip_` would neither change gradients of this norm nor remember it.

        Whoever has the norm of all gradients on the host saves a read and a write of them all.
        """
        return False


class NormClipping(Clipping, abc.ABC):
    r"""Scale gradients so that a norm is at most a bound :math:`c`: :math:`g \cdot \min(1, c / (n + 10^{-6}))`.

    A subclass says what the bound is::

        >>> class ToMean(NormClipping):
        ...     '''Make no norm larger than the mean of all tensors' norms.'''
        ...     def bound(self, norms, *, step=0, total=math.inf):
        ...         return norms.nanmean()
        >>> grads = [torch.tensor([3.0]), torch.tensor([5.0])]
        >>> ToMean(scope="tensor").clip_(grads)
        tensor(5.8310)
        >>> grads
        [tensor([3.]), tensor([4.0000])]

    Args:
        norm_type: The exponent p > 0 of the norm; ``inf`` for the largest absolute value.
        scope: What has a norm and a bound of its own: ``"global"``, all gradients of an optimizer, which keeps the
            direction of the step; ``"group"``, each of its ``param_groups``; ``"tensor"``, each tensor.
        on: The parameters on whose gradients it acts: a glob over names, a module class, a predicate, or a list of
            these. Default: all.
        exclude: What is left out of them, in the same terms.
    """

    identity_args = ("on", "exclude", "norm_type", "scope")
    _factors: Tensor | None = None
    _count: int = 0  # Of units, as far as they were seen.

    def __init__(
        self,
        norm_type: float = 2.0,
        scope: Scope = "global",
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        check_number("norm_type", norm_type, low=0.0, low_open=True, high=math.inf)
        if scope not in get_args(Scope):
            raise ValueError(f"`scope` must be one of {get_args(Scope)}, got {scope!r}")
        self.norm_type, self.scope, self.on, self.exclude = norm_type, scope, on, exclude

    @abc.abstractmethod
    def bound(self, norms: Tensor, *, step: int = 0, total: float = math.inf) -> Tensor | float:
        """The bound on each of ``norms``, a vector with one entry for each unit of the scope; ``inf`` for none.

        The norm of a unit that has no gradient in this step is NaN. There are more units when the optimizer gets more
        parameters. Called once in each step: what is remembered of the norms is remembered here.
        """

    @torch.no_grad()
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
            self._count = max([self._count, *(unit + 1 for unit in units)])
            norms = _by_unit(each, units, self._count, self.norm_type)
        factors = torch.clamp(self.bound(norms, step=step, total=total) / (norms + 1e-6), max=1.0)
        self._factors = factors
        if self.scope == "global":
            for device, some_grads in by_device(grads).items():
                torch._foreach_mul_(some_grads, factors[0].to(device))
        else:
            unbound, locals_ = factors.unbind(), shards.local(grads)
            mine = [unbound[unit].to(shard.device) for unit, shard in zip(units, locals_, strict=True)]
            torch._foreach_mul_(locals_, mine)
        return norm

    @property
    def clipped(self) -> Tensor | None:
        return None if self._factors is None else (self._factors < 1.0).any()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_factors": None}


class ClipByNorm(NormClipping):
    r"""Scale all gradients by one factor: :math:`g \cdot \min(1, c / (n + 10^{-6}))`, so that their norm is at most c.

    :math:`n` is the norm of all gradients together, so the direction of the step is kept (arXiv:1211.5063). The result
    is that of :func:`torch.nn.utils.clip_grad_norm_`, except that the norm of half-precision gradients is computed in
    fp32, and that it is exact for any mixture of DTensors and plain tensors whose values agree on all ranks. If the
    norm is NaN or infinite, so are the gradients afterwards, as in torch.

    Args:
        max_norm: The bound :math:`c > 0`; 1.0 is common. ``inf`` never clips and still returns the norm.
        norm_type: The exponent p > 0 of the norm; ``inf`` for the largest absolute value. Default 2.
        scope: What has a norm of its own: ``"global"``, all gradients of an optimizer; ``"group"``, each of its
            ``param_groups``; ``"tensor"``, each tensor. The last two change the direction of the step.
        on: The parameters on whose gradients it acts: a glob over names, a module class, a predicate, or a list of
            these. Default: all.
        exclude: What is left out of them, in the same terms.

    Raises:
        ValueError: If ``max_norm`` is not a number > 0 or a schedule of such numbers, ``norm_type`` not a number > 0,
            or ``scope`` none of the three.

    Example::

        >>> grads = [torch.tensor([3.0]), torch.tensor([[4.0]])]
        >>> ClipByNorm(1.0).clip_(grads)
        tensor(5.)
        >>> grads
        [tensor([0.6000]), tensor([[0.8000]])]
    """

    def __init__(
        self,
        max_norm: float | Schedule,
        norm_type: float = 2.0,
        scope: Scope = "global",
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        check_number("max_norm", max_norm, low=0.0, low_open=True, high=math.inf, schedule=True)
        super().__init__(norm_type, scope, on, exclude)
        self.max_norm = max_norm

    def bound(self, norms: Tensor, *, step: int = 0, total: float = math.inf) -> float:
        return value_at(self.max_norm, step, total)

    def is_idle(self, norm: float, *, step: int = 0, total: float = math.inf) -> bool:
        # A part has no larger norm than the whole, so it holds for every scope.
        return norm + 1e-6 <= value_at(self.max_norm, step, total)


class ClipByValue(Clipping):
    r"""Clip every element by itself: :math:`\max(-v, \min(v, g))`.

    This changes the direction of the step. Equal to :func:`torch.nn.utils.clip_grad_value_`.

    It needs no norm, so it computes none: it returns the ``norm`` that it was given, or ``None``.

    Args:
        value: The bound :math:`v > 0`.
        on: The parameters on whose gradients it acts: a glob over names, a module class, a predicate, or a list of
            these. Default: all.
        exclude: What is left out of them, in the same terms.

    Raises:
        ValueError: If ``value`` is not a number > 0 or a schedule of such numbers.

    Example::

        >>> grad = torch.tensor([0.2, -3.0])
        >>> ClipByValue(0.5).clip_([grad])
        >>> grad
        tensor([ 0.2000, -0.5000])
    """

    def __init__(
        self,
        value: float | Schedule,
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        check_number("value", value, low=0.0, low_open=True, high=math.inf, schedule=True)
        self.value, self.on, self.exclude = value, on, exclude

    @torch.no_grad()
    def clip_(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor] = (),
        *,
        norm: Tensor | None = None,
        step: int = 0,
        total: float = math.inf,
    ) -> Tensor | None:
        bound = value_at(self.value, step, total)
        for some_grads in by_device(grads).values():
            torch._foreach_clamp_min_(some_grads, -bound)
            torch._foreach_clamp_max_(some_grads, bound)
        return norm


def by_device(grads: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    """The local parts of the gradients; a model that is split over devices has several lists."""
    parts = shards.local(grads)
    if len({part.device for part in parts}) == 1:
        return {parts[0].device: parts}
    groups: dict[torch.device, list[Tensor]] = {}
    for grad in parts:
        groups.setdefault(grad.device, []).append(grad)
    return groups


def _by_unit(each: Tensor, units: Sequence[int], count: int, norm_type: float) -> Tensor:
    """The norm of each of ``count`` units, of the tensors' norms; NaN for a unit that has no gradient."""
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
