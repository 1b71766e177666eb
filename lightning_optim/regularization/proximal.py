"""Proximal steps: what is done to the weights after the optimizer step."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.policy import Policy
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.base.selection import Selector


class Proximal(Policy, abc.ABC):
    """A projection of the weights that follows each optimizer step.

    What a gradient cannot do, such as weights that are exactly zero or norms that never exceed a bound, is done to the
    weights themselves. It does not pass through momentum or an adaptive scale, and needs no factor for accumulation.

    A new proximal step is a subclass with :meth:`project_`::

        >>> class Box(Proximal):
        ...     def project_(self, weights, *, lr, step=0, total=math.inf):
        ...         torch._foreach_clamp_max_(shards.local_shards(weights), 1.0)
        >>> weight = torch.tensor([0.5, 2.0])
        >>> Box().project_([weight], lr=0.1)
        >>> weight
        tensor([0.5000, 1.0000])

    Attributes:
        on: The parameters that are projected, for :func:`~lightning_optim.base.selection.select`;
            ``None`` takes those with
            two dimensions or more.
        exclude: What is left out of them, in the same terms.
    """

    on: Selector | Sequence[Selector] | None = None
    exclude: Selector | Sequence[Selector] | None = None

    @abc.abstractmethod
    def project_(self, weights: Sequence[Tensor], *, lr: float, step: int = 0, total: float = math.inf) -> None:
        """Project the weights in place.

        Args:
            weights: Tensors of any shape, plain or DTensors, of one parameter group.
            lr: The learning rate of the step that was just made.
            step: The number of optimizer steps made before that one, for schedules.
            total: The number of optimizer steps in the run, for schedules.
        """


class ProximalL1(Proximal):
    r"""The soft threshold: :math:`w \leftarrow \mathrm{sign}(w) \max(|w| - \eta s, 0)`, :math:`\eta` the learning rate.

    It minimizes the same sum as :class:`L1` under plain SGD, and makes weights exactly zero, which a gradient does not.
    Under Adam the two differ: this threshold is not divided by the second moment. A learning rate that decays to zero
    takes the threshold with it.

    Args:
        strength: The factor :math:`s \ge 0`.
        on: The parameters that are projected: a glob over names, a module class, a predicate, or a list of these.
            Default: those with two dimensions or more.
        exclude: What is left out of them, in the same terms.

    Raises:
        ValueError: If ``strength`` is not a number >= 0 or a schedule of such numbers.

    Example::

        >>> weight = torch.tensor([0.5, 0.05, -0.5])
        >>> ProximalL1(1.0).project_([weight], lr=0.1)
        >>> weight
        tensor([ 0.4000,  0.0000, -0.4000])
    """

    def __init__(
        self,
        strength: float | Schedule,
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        check_number("strength", strength, low=0.0, schedule=True)
        self.strength, self.on, self.exclude = strength, on, exclude

    @torch.no_grad()
    def project_(self, weights: Sequence[Tensor], *, lr: float, step: int = 0, total: float = math.inf) -> None:
        threshold = lr * value_at(self.strength, step, total)
        for weight in shards.local_shards(weights):
            softshrink(weight, threshold, out=weight)  # type: ignore[call-arg]
