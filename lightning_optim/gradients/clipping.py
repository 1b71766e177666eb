"""Gradient clipping: gradients that are too large are made smaller before the optimizer step."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim import tensors
from lightning_optim.policy import Policy
from lightning_optim.schedules import Schedule, check_number, value_at


class Clipping(Policy, abc.ABC):
    """What is done to the gradients of one optimizer before its step.

    A new clipping is a subclass with :meth:`clip_`::

        >>> class Sign(Clipping):
        ...     '''Keep the sign of every element.'''
        ...     def clip_(self, grads, weights=(), *, norm=None, step=0, total=math.inf):
        ...         torch._foreach_sign_(tensors.local(grads))
        ...         return norm
        >>> grad = torch.tensor([3.0, -4.0])
        >>> Sign().clip_([grad])
        >>> grad
        tensor([ 1., -1.])

    Attributes:
        norm_type: Which norm :meth:`clip_` takes and returns: the exponent p, or ``inf``. Default 2.
    """

    identity_args: ClassVar[tuple[str, ...]] = ()
    norm_type: float = 2.0

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


class ClipByNorm(Clipping):
    r"""Scale all gradients by one factor: :math:`g \cdot \min(1, c / (n + 10^{-6}))`, so that their norm is at most c.

    :math:`n` is the norm of all gradients together, so the direction of the step is kept (arXiv:1211.5063). The result
    is that of :func:`torch.nn.utils.clip_grad_norm_`, except that the norm of half-precision gradients is computed in
    fp32, and that it is exact for any mixture of DTensors and plain tensors whose values agree on all ranks. If the
    norm is NaN or infinite, so are the gradients afterwards, as in torch.

    Args:
        max_norm: The bound :math:`c > 0`; 1.0 is common. ``inf`` never clips and still returns the norm.
        norm_type: The exponent p > 0 of the norm; ``inf`` for the largest absolute value. Default 2.

    Raises:
        ValueError: If ``max_norm`` is not a number > 0 or a schedule of such numbers, or ``norm_type`` not a number >
            0.

    Example::

        >>> grads = [torch.tensor([3.0]), torch.tensor([[4.0]])]
        >>> ClipByNorm(1.0).clip_(grads)
        tensor(5.)
        >>> grads
        [tensor([0.6000]), tensor([[0.8000]])]
    """

    identity_args = ("norm_type",)

    def __init__(self, max_norm: float | Schedule, norm_type: float = 2.0) -> None:
        check_number("max_norm", max_norm, low=0.0, low_open=True, high=math.inf, schedule=True)
        check_number("norm_type", norm_type, low=0.0, low_open=True, high=math.inf)
        self.max_norm, self.norm_type = max_norm, norm_type

    @torch.no_grad()
    def clip_(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor] = (),
        *,
        norm: Tensor | None = None,
        step: int = 0,
        total: float = math.inf,
    ) -> Tensor:
        norm = tensors.total_norm(grads, self.norm_type) if norm is None else norm
        factor = torch.clamp(value_at(self.max_norm, step, total) / (norm + 1e-6), max=1.0)
        for device, some_grads in _by_device(grads).items():
            torch._foreach_mul_(some_grads, factor.to(device))
        return norm


class ClipByValue(Clipping):
    r"""Clip every element by itself: :math:`\max(-v, \min(v, g))`.

    This changes the direction of the step. Equal to :func:`torch.nn.utils.clip_grad_value_`.

    It needs no norm, so it computes none: it returns the ``norm`` that it was given, or ``None``.

    Args:
        value: The bound :math:`v > 0`.

    Raises:
        ValueError: If ``value`` is not a number > 0 or a schedule of such numbers.

    Example::

        >>> grad = torch.tensor([0.2, -3.0])
        >>> ClipByValue(0.5).clip_([grad])
        >>> grad
        tensor([ 0.2000, -0.5000])
    """

    def __init__(self, value: float | Schedule) -> None:
        check_number("value", value, low=0.0, low_open=True, high=math.inf, schedule=True)
        self.value = value

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
        for some_grads in _by_device(grads).values():
            torch._foreach_clamp_min_(some_grads, -bound)
            torch._foreach_clamp_max_(some_grads, bound)
        return norm


def _by_device(grads: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    """The local parts of the gradients; a model that is split over devices has several lists."""
    groups: dict[torch.device, list[Tensor]] = {}
    for grad in tensors.local(grads):
        groups.setdefault(grad.device, []).append(grad)
    return groups
