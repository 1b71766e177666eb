"""Define the base class of policies that change gradients before the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_optim.base import shards
from lightning_optim.base.dtypes import without_autocast
from lightning_optim.base.policy import ParameterPolicy

Scope: TypeAlias = Literal["global", "group", "tensor"]


class Clipping(ParameterPolicy):
    """Base class of policies that change the gradients of one optimizer before its step.

    A new one is a subclass with ``_clip_``, the formula. It changes the gradients in place; the base class disables
    autograd, and takes care of the norm and of the step's number::

        >>> from lightning_optim.base import local_shards
        >>> class Sign(Clipping):
        ...     '''Keep the sign of every element.'''
        ...     def _clip_(self, grads, weights):
        ...         torch._foreach_sign_(local_shards(grads))
        >>> grad = torch.tensor([3.0, -4.0])
        >>> Sign().clip_([grad])
        >>> grad
        tensor([ 1., -1.])

    A formula that computes a norm, and returns it, overrides :meth:`clip_` itself.

    Args:
        on: The parameters on whose gradients it acts, for :func:`~lightning_optim.base.select`; ``None`` takes all. In
            a hand-written loop, pass the gradients that it should act on.
        exclude: The parameters that are left out, in the same terms.

    Attributes:
        norm_type: Exponent p of the norm that :meth:`clip_` takes and returns, or ``inf``. Default 2.
        scope: Parts with a norm of their own: all gradients, each of the optimizer's ``param_groups``, or each tensor.
            If it is not ``"global"``, the caller passes ``units=`` to :meth:`clip_`: the number of each gradient's
            group, or of its tensor.
        limits: True if it makes gradients smaller, so that a step is clipped or not.

    For a Trainer: ``Trainer(callbacks=[GradientClipping(Sign())])``.
    """

    used_in = "GradientClipping({})"
    formulas: ClassVar[tuple[tuple[str, ...], ...]] = (("_clip_", "clip_"),)
    norm_type: float = 2.0
    scope: Scope = "global"
    limits: ClassVar[bool] = True

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
    ) -> Tensor | None:
        """Change the gradients in place.

        Nothing waits for the device: a decision is a factor, and never a branch.

        Args:
            grads: Whole, unscaled gradients of any shape, plain or DTensors, with the placements of their parameters.
            weights: Their parameters, in the same order, for the formulas that need them.
            norm: The norm :attr:`norm_type` of all of ``grads``, if the caller knows it already.
            step: Number of optimizer steps made before, for schedules.
            total: Number of optimizer steps in the run, for schedules.

        Returns:
            The norm before clipping, a scalar on the gradients' device: ``norm`` where it was given, else the one that
            the formula computed. ``None`` if the formula needs no norm and none was given.
        """
        if grads:
            self._at(step, total)
            self._clip_(grads, weights)
        return norm

    def _clip_(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Change the gradients in place; to be overridden. There is at least one gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no `_clip_(self, grads, weights)`")

    @property
    def in_words(self) -> str:
        return f"clip {self.brief}" if self.limits else self.brief

    @property
    def factors(self) -> Tensor | None:
        """Factors of the last :meth:`clip_`, a vector below 1 where gradients became smaller; ``None`` if unknown."""
        return None

    @property
    def clipped(self) -> Tensor | None:
        """True if the last :meth:`clip_` made anything smaller: a scalar on the device, or ``None`` if unknown."""
        return None

    def bound_in_force(self, *, step: int = 0, total: float = math.inf) -> Tensor | float | None:
        """Return the norm above which this step's gradients are clipped, for plots; nothing is computed for it.

        Args:
            step: Number of optimizer steps made before this one, to which :meth:`clip_` was applied.
            total: Number of optimizer steps in the run.

        Returns:
            A number, or a scalar on the device; infinity where nothing is clipped; ``None`` if there is no bound on the
            norm of all gradients together.
        """
        return None

    def is_idle(self, norm: float, *, step: int = 0, total: float = math.inf) -> bool:
        """Return True if :meth:`clip_` would neither change gradients of this norm nor remember it.

        A caller who has the norm of all gradients on the host saves a read and a write of them all.
        """
        return False


def by_device(grads: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    """Return the local shards of the gradients by device; a model that is split over devices has several."""
    parts = shards.local_shards(grads)
    if len({part.device for part in parts}) == 1:
        return {parts[0].device: parts}
    groups: dict[torch.device, list[Tensor]] = {}
    for grad in parts:
        groups.setdefault(grad.device, []).append(grad)
    return groups
