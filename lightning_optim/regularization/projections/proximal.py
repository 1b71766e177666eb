"""Define the base class of projections: changes of the weights after the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.base.dtypes import without_autocast
from lightning_optim.base.policy import ParameterPolicy


class Proximal(ParameterPolicy):
    """Base class of projections of the weights that follow each optimizer step.

    They do what a gradient cannot do, such as weights that are exactly zero or norms that never exceed a bound. A
    projection does not pass through momentum or an adaptive scale, and needs no factor for accumulation.

    A new one is a subclass with ``_project_``, the formula::

        >>> from lightning_optim.base import local_shards
        >>> class Box(Proximal):
        ...     '''Keep every weight below 1.'''
        ...     def _project_(self, weights, lr):
        ...         torch._foreach_clamp_max_(local_shards(weights), 1.0)
        >>> weight = torch.tensor([0.5, 2.0])
        >>> Box().project_([weight], lr=0.1)
        >>> weight
        tensor([0.5000, 1.0000])

    Args:
        on: The parameters that are projected, for :func:`~lightning_optim.base.select`; ``None`` takes those with two
            dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    For a Trainer: ``Trainer(callbacks=[WeightRegularization(Box())])``.
    """

    used_in = "WeightRegularization({})"
    formulas = (("_project_", "project_"),)
    makes_zeros: ClassVar[bool] = False
    """True if it makes weights exactly zero: then their share is logged."""

    @torch.no_grad()
    @without_autocast
    def project_(self, weights: Sequence[Tensor], *, lr: float, step: int = 0, total: float = math.inf) -> None:
        """Project the weights in place.

        Args:
            weights: Tensors of any shape, plain or DTensors, of one parameter group.
            lr: The learning rate of the step that was just made.
            step: Number of optimizer steps made before that one, for schedules.
            total: Number of optimizer steps in the run, for schedules.
        """
        if weights:
            self._at(step, total)
            self._project_(weights, lr)

    def _project_(self, weights: Sequence[Tensor], lr: float) -> None:
        """Project the weights in place; to be overridden. There is at least one weight."""
        raise NotImplementedError(f"{type(self).__name__} has no `_project_(self, weights, lr)`")
