"""Shrink weights in proportion to themselves at each step of any optimizer: decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_optim.base import foreach, shards
from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.base.dtypes import without_autocast
from lightning_optim.base.policy import ParameterPolicy
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors


class WeightDecay(ParameterPolicy):
    r"""Decay weights beside the step of any optimizer: :math:`w \leftarrow w - \eta s w`, as AdamW does.

    :math:`\eta` is the learning rate and w the weight before the step. Decoupled from the gradient, the decay does not
    pass through momentum or an adaptive scale (Loshchilov and Hutter, *Decoupled Weight Decay Regularization*,
    `arXiv:1711.05101 <https://arxiv.org/abs/1711.05101>`_): every weight shrinks at the same rate, which an :class:`L2`
    penalty under Adam does not do.

    Cautious decay acts only where the optimizer's own move :math:`u`, which it subtracts, and the weight do not have
    opposite signs: :math:`w \leftarrow w - \eta s \, [u w \ge 0] \, w` (Chen et al., *Cautious Weight Decay*,
    `arXiv:2510.12402 <https://arxiv.org/abs/2510.12402>`_), so that it never works against the optimizer.

    It acts on weights that have a gradient in this step, and only if the step is taken. Set the optimizer's own
    ``weight_decay`` to 0.

    Args:
        strength: The factor :math:`s \ge 0`, as the ``weight_decay`` of AdamW, which is 0.01 by default. The decay of a
            whole run of T steps is about :math:`e^{-\eta s T}`, so a short run needs more: with :math:`\eta T = 1` and
            little data 0.3 to 10 was best.
        cautious: Decay only where the optimizer does not move the weight away from zero. Its best strength is larger,
            and one that is too large does less harm. It keeps a copy of the decayed weights.
        follows_lr: Default True: the decay is :math:`\eta s`, as in torch. False: it is :math:`s` itself, whatever the
            learning rate; take 1e-4 or so. ``"schedule"``: it is :math:`\eta s \cdot \eta / \eta_{max}`, so that the
            weights of normalized layers keep their size while the learning rate decays (Defazio, `arXiv:2506.02285
            <https://arxiv.org/abs/2506.02285>`_); :math:`\eta_{max}` is the group's ``max_lr`` or ``initial_lr``, which
            learning-rate schedulers write there, or its largest learning rate so far if that is larger.
        on: The parameters that decay: a glob over names, a module class, a predicate, or a list of these. Default:
            those with two dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If ``strength`` is not a number >= 0, with ``follows_lr=False`` in [0, 1], or a schedule of such
            numbers; or if another argument is not one of those above.

    Example::

        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[1.0, 1.0]])
        >>> decay = WeightDecay(0.5)
        >>> decay.before_step_([weight], lr=0.1)
        >>> optimizer.step()
        >>> decay.after_step_()
        >>> weight.detach()
        tensor([[ 0.8500, -2.0000]])
        >>> callback = WeightRegularization(WeightDecay(0.01))  # for Trainer(callbacks=[callback])
    """

    used_in = "WeightRegularization({})"
    decays = True
    """True if it pulls each weight towards zero in proportion to the weight; False with a strength of 0."""

    def __init__(
        self,
        strength: float | Schedule,
        cautious: bool = False,
        follows_lr: bool | Literal["schedule"] = True,
        on: Selectors = None,
        exclude: Selectors = None,
    ) -> None:
        self.cautious = check_choice("cautious", cautious, Literal[True, False])
        self.follows_lr = check_choice("follows_lr", follows_lr, Literal[True, False, "schedule"])
        most = 1.0 if self.follows_lr is False else None  # above, a step would turn the signs of the weights
        self.strength = check_number("strength", strength, low=0.0, high=most, schedule=True)
        self.decays = strength != 0.0
        super().__init__(on, exclude)
        self._copies: list[Tensor] = []  # values of pieces of the weights before the step, reused in each step
        # Weights that were copied, the number of their pieces, and the factor of their decay.
        self._waiting: list[tuple[list[Tensor], int, float]] = []

    def reset(self) -> None:
        super().reset()
        self._copies, self._waiting = [], []

    @torch.no_grad()
    @without_autocast
    def before_step_(
        self,
        weights: Sequence[Tensor],
        *,
        lr: float,
        max_lr: float | None = None,
        step: int = 0,
        total: float = math.inf,
    ) -> None:
        """Decay the weights in place, or, if cautious, copy them. To be called just before the optimizer's step.

        Args:
            weights: Tensors of any shape, plain or DTensors, of one parameter group.
            lr: The learning rate of the step.
            max_lr: The largest learning rate of the run, for ``follows_lr="schedule"``; ``lr`` by default.
            step: Number of optimizer steps made before, for schedules.
            total: Number of optimizer steps in the run, for schedules.
        """
        self._at(step, total)
        factor = self.current(self.strength) * self._rate(lr, max_lr)
        if not weights or not factor:
            return
        if self.cautious:
            self._copy(weights, factor)
        else:
            foreach.scale_(shards.local_shards(weights), 1.0 - factor)

    def _copy(self, weights: Sequence[Tensor], factor: float) -> None:
        first = sum(count for _, count, _ in self._waiting)
        count = 0
        for place, piece in enumerate(_pieces(weights), start=first):
            size, like = sum(tensor.numel() for tensor in piece), piece[0]
            if place == len(self._copies):
                self._copies.append(like.new_empty(size))
            copy = self._copies[place]
            if (len(copy), copy.dtype, copy.device) != (size, like.dtype, like.device):
                copy = self._copies[place] = like.new_empty(size)
            torch.cat(_flat(piece), out=copy)
            count += 1
        self._waiting.append((list(weights), count, factor))

    @torch.no_grad()
    @without_autocast
    def after_step_(self) -> None:
        """Decay the weights that :meth:`before_step_` copied. To be called after the optimizer's step."""
        waiting, self._waiting = self._waiting, []
        copies = iter(self._copies)
        for weights, _, factor in waiting:
            for piece in _pieces(weights):
                _decay_(piece, next(copies), factor)

    def _rate(self, lr: float, max_lr: float | None) -> float:
        if self.follows_lr is False:
            return 1.0
        if self.follows_lr is True:
            return lr
        return lr * lr / max_lr if max_lr else lr

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": [], "_waiting": []}


def _decay_(piece: list[Tensor], old: Tensor, factor: float) -> None:
    """Subtract ``factor * old`` from a piece of the weights, where they were not moved away from zero.

    A weight was moved away from zero if it is more than once its old value. A quotient needs fewer passes than the
    product of the move and the old value, and does not vanish in half precision.
    """
    single = len(piece) == 1 and piece[0].is_contiguous()
    new = piece[0].view(-1) if single else torch.cat(_flat(piece))
    decays = torch.div(new, old, out=None if single else new).le_(1.0)
    if single:
        new.addcmul_(old, decays, value=-factor)
        return
    sizes = [tensor.numel() for tensor in piece]
    parts = zip(torch.split(decays.mul_(old), sizes), piece, strict=True)
    torch._foreach_add_(piece, [part.view_as(tensor) for part, tensor in parts], alpha=-factor)


def _pieces(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield live parts of the weights, of up to 1 MB each on a CPU, of one dtype and device; complex ones as real."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in shards.local_shards(weights):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        alike.setdefault((real.dtype, real.device), []).append(real)
    for tensors in alike.values():
        yield from (piece for (piece,) in foreach.chunks(tensors))


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.reshape(-1) for tensor in tensors]
