"""Clipping of each element by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.base.arguments import check_number
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors
from lightning_optim.gradients.clipping.clipping_policy import Clipping, by_device


class ClipByValue(Clipping):
    r"""Clip every element by itself: :math:`\max(-v, \min(v, g))`.

    This changes the direction of the step. Equal to :func:`torch.nn.utils.clip_grad_value_`. It needs no norm, so it
    computes none: it returns the ``norm`` that it was given, or ``None``.

    Args:
        value: The bound :math:`v > 0`.
        on: The parameters on whose gradients it acts: a glob over names, a module class, a predicate, or a list of
            these. Default: all.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If ``value`` is not a number > 0 or a schedule of such numbers.

    Example::

        >>> grad = torch.tensor([0.2, -3.0])
        >>> ClipByValue(0.5).clip_([grad])
        >>> grad
        tensor([ 0.2000, -0.5000])

    For a Trainer: ``Trainer(callbacks=[GradientClipping(ClipByValue(0.5))])``.
    """

    def __init__(self, value: float | Schedule, on: Selectors = None, exclude: Selectors = None) -> None:
        self.value = check_number("value", value, low=0.0, low_open=True, high=math.inf, schedule=True)
        super().__init__(on, exclude)

    @property
    def in_words(self) -> str:
        return f"clip value {self.value}" if len(self._written) == 1 else super().in_words

    def _clip_(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        bound = self.current(self.value)
        for some_grads in by_device(grads).values():
            torch._foreach_clamp_min_(some_grads, -bound)
            torch._foreach_clamp_max_(some_grads, bound)
