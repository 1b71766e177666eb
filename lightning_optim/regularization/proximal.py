"""Project weights after the optimizer step (proximal steps)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.dtypes import without_autocast
from lightning_optim.base.policy import ParameterPolicy
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors


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


class ProximalL1(Proximal):
    r"""Apply the soft threshold: :math:`w \leftarrow \mathrm{sign}(w) \max(|w| - \eta s, 0)`.

    :math:`\eta` is the learning rate. It minimizes the same sum as :class:`L1` under plain SGD, and makes weights
    exactly zero, which a gradient does not. Under Adam the two differ: this threshold is not divided by the second
    moment. A learning rate that decays to zero takes the threshold with it.

    Args:
        strength: The factor :math:`s \ge 0`.
        on: The parameters that are projected: a glob over names, a module class, a predicate, or a list of these.
            Default: those with two dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If ``strength`` is not a number >= 0 or a schedule of such numbers.

    Example::

        >>> weight = torch.tensor([0.5, 0.05, -0.5])
        >>> ProximalL1(1.0).project_([weight], lr=0.1)
        >>> weight
        tensor([ 0.4000,  0.0000, -0.4000])
        >>> callback = WeightRegularization(ProximalL1(1e-4))  # for Trainer(callbacks=[callback])
    """

    def __init__(self, strength: float | Schedule, on: Selectors = None, exclude: Selectors = None) -> None:
        self.strength = check_number("strength", strength, low=0.0, schedule=True)
        super().__init__(on, exclude)

    def _project_(self, weights: Sequence[Tensor], lr: float) -> None:
        threshold = lr * self.current(self.strength)
        for weight in shards.local_shards(weights):
            softshrink(weight, threshold, out=weight)  # type: ignore[call-arg]
