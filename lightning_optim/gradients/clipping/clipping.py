"""The base class of what is done to gradients before a step."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_optim.base import shards
from lightning_optim.base.policy import Policy
from lightning_optim.base.selection import Selector

Scope: TypeAlias = Literal["global", "group", "tensor"]


class Clipping(Policy, abc.ABC):
    """What is done to the gradients of one optimizer before its step.

    A new clipping is a subclass with :meth:`clip_`::

        >>> class Sign(Clipping):
        ...     '''Keep the sign of every element.'''
        ...     def clip_(self, grads, weights=(), *, norm=None, step=0, total=math.inf):
        ...         torch._foreach_sign_(shards.local_shards(grads))
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


def by_device(grads: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    """The local parts of the gradients; a model that is split over devices has several lists."""
    parts = shards.local_shards(grads)
    if len({part.device for part in parts}) == 1:
        return {parts[0].device: parts}
    groups: dict[torch.device, list[Tensor]] = {}
    for grad in parts:
        groups.setdefault(grad.device, []).append(grad)
    return groups
