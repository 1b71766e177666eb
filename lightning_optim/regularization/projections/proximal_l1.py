"""Move each weight towards zero after the optimizer step, and small ones to exactly zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from lightning_optim.base import foreach, shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors
from lightning_optim.regularization.projections.proximal import Proximal


class ProximalL1(Proximal):
    r"""Apply the soft threshold: :math:`w \leftarrow \mathrm{sign}(w) \max(|w| - \eta s, 0)`.

    :math:`\eta` is the learning rate. It minimizes the same sum as :class:`L1` under plain SGD, and makes weights
    exactly zero, which a gradient does not. Momentum m multiplies the force of a gradient by :math:`1 / (1 - m)`, and
    not this threshold. Under Adam the two differ more: the threshold is not divided by the root of the second moment,
    and so is not the proximal step of Adam's metric. A learning rate that decays to zero takes the threshold with it.
    The size of a complex weight is shortened, and its direction stays.

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

    makes_zeros = True

    def __init__(self, strength: float | Schedule, on: Selectors = None, exclude: Selectors = None) -> None:
        self.strength = check_number("strength", strength, low=0.0, schedule=True)
        super().__init__(on, exclude)

    def _project_(self, weights: Sequence[Tensor], lr: float) -> None:
        threshold = lr * self.current(self.strength)
        for weight in shards.local_shards(weights):
            if weight.is_complex():
                _shrink_(weight, threshold)
            else:
                softshrink(weight, threshold, out=weight)  # type: ignore[call-arg]


def _shrink_(weight: Tensor, threshold: float) -> None:
    """Shorten complex numbers by the threshold; ``softshrink`` of torch does not take them."""
    for ((piece,),) in foreach.chunks([weight]):
        size = piece.abs()
        piece.mul_(torch.where(size > threshold, 1.0 - threshold / size, 0.0))
