"""Averages of weights over training steps."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim import tensors
from lightning_optim.policy import Policy
from lightning_optim.schedules import check_number


class Average(Policy, abc.ABC):
    """An average of the weights over the optimizer steps, one copy of it for each optimizer.

    The averaged tensors are live storage with the shapes, devices and placements of the weights, in fp32 where the
    weights are in half precision: in bf16 the increments of a slow average are below the last bit. Their values may be
    exchanged with those of the weights, and back, between two updates.

    A new average is a subclass with :meth:`update_`, which keeps its tensors in ``self._averaged`` and whatever it
    counts in ``self._counters``. Everything else is here::

        >>> class Last(Average):
        ...     def update_(self, weights, *, step):
        ...         self._averaged, self._counters = [copy_of(weight) for weight in weights], {"last": step}
        >>> average = Last()
        >>> average.started
        False
        >>> average.update_([torch.ones(2)], step=1)
        >>> average.averaged
        [tensor([1., 1.])]
    """

    identity_args: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next update is the first."""
        self._averaged: list[Tensor] = []
        self._counters: dict[str, int] = {}

    @abc.abstractmethod
    def update_(self, weights: Sequence[Tensor], *, step: int) -> None:
        """Take in the weights.

        Args:
            weights: Plain tensors or DTensors, floating or complex; the same ones in the same order at every call.
            step: The number of optimizer steps made so far. It never decreases.
        """

    @property
    def averaged(self) -> list[Tensor]:
        """The average of each tensor, as live storage; empty before the first update."""
        return self._averaged

    @property
    def started(self) -> bool:
        """Whether there was an update. What never started holds nothing that could be used."""
        return bool(self._counters)

    @property
    def counters(self) -> dict[str, int]:
        """What is remembered beside the tensors."""
        return dict(self._counters)

    def load(self, counters: dict[str, int], averaged: Sequence[Tensor]) -> None:
        """Take over counters and tensors, which become this average's own storage.

        Args:
            counters: What :attr:`counters` was.
            averaged: What :attr:`averaged` was, with the devices and placements of the weights.
        """
        self._counters, self._averaged = dict(counters), list(averaged)

    def state_dict(self) -> dict[str, Any]:
        """The counters and the averaged tensors, which are live storage, as in :meth:`torch.nn.Module.state_dict`."""
        return {"counters": self.counters, "averaged": list(self._averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a copy of what :meth:`state_dict` returned."""
        self.load(state["counters"], [tensor.clone() for tensor in state["averaged"]])


class EMA(Average):
    r"""The exponential moving average: :math:`e \leftarrow e + (1 - d^k)(w - e)`.

    The decay per step is :math:`d = \min(decay,\ 1 - (1 + t)^{-warmup})`, where :math:`t` counts the optimizer steps
    since the first update, and :math:`k` those since the previous one: an average that is updated every k steps forgets
    as fast as one that is updated at each. The first update copies the weights. Averaged weights generalize better, and
    resist noisy labels better, than the last ones (arXiv:2411.18704).

    Args:
        decay: The share that is kept per optimizer step, in [0, 1). The average looks back about
            :math:`1 / (1 - decay)` steps: 0.99 suits runs of some thousand steps, 0.999 of some ten thousand, 0.9999 of
            some hundred thousand.
        warmup: The power of the warm-up, positive, in which the average looks back over a part of the steps so far. The
            default 2/3 suits runs up to a million steps: it reaches a decay of 0.999 after 31.6 thousand steps and
            0.9999 after a million. 3/4 reaches them after 10 and 215 thousand. ``None`` has the full decay from the
            second update on, and the weights of the first update stay in it for long.

    Raises:
        ValueError: If ``decay`` is not a number in [0, 1) or ``warmup`` not ``None`` or a number > 0.

    Example::

        >>> ema = EMA(0.9)
        >>> weight = torch.tensor([1.0])
        >>> for step in range(1, 4):
        ...     ema.update_([weight], step=step)
        ...     weight += 1.0
        >>> ema.averaged
        [tensor([2.2886])]
    """

    def __init__(self, decay: float, warmup: float | None = 2 / 3) -> None:
        check_number("decay", decay, low=0.0, high=1.0, high_open=True)
        if warmup is not None:
            check_number("warmup", warmup, low=0.0, low_open=True)
        super().__init__()
        self.decay, self.warmup = decay, warmup

    def decay_at(self, t: int) -> float:
        """The decay per step, t optimizer steps after the first update.

        Example::

            >>> round(EMA(0.999).decay_at(1), 4), EMA(0.999).decay_at(100_000)
            (0.37, 0.999)
        """
        return self.decay if self.warmup is None else min(self.decay, 1.0 - (1.0 + t) ** -self.warmup)

    @torch.no_grad()
    def update_(self, weights: Sequence[Tensor], *, step: int) -> None:
        if not self.started:
            self._averaged = [copy_of(weight) for weight in weights]
            self._counters = {"first": step, "last": step}
            return
        since = step - self._counters["last"]
        if since < 0:
            raise ValueError(f"`step` must not decrease, got {step} after {self._counters['last']}")
        share = 1.0 - self.decay_at(step - self._counters["first"]) ** since
        _lerp_(tensors.local(self._averaged), tensors.local(weights), share)
        self._counters["last"] = step


def copy_of(weight: Tensor) -> Tensor:
    """A copy with the shape, device and placement of a weight, in the dtype in which averages are kept."""
    weight = weight.detach()
    (shard,) = tensors.local([weight])
    return tensors.placed_as(shard.to(tensors.accumulation_dtype(weight), copy=True), weight)


def _lerp_(averaged: list[Tensor], weights: list[Tensor], share: float) -> None:
    """Move every average by a share of the way to its weight."""
    if all(mean.dtype == weight.dtype for mean, weight in zip(averaged, weights, strict=True)):
        if averaged:
            torch._foreach_lerp_(averaged, weights, share)
        return
    for some_averaged, some_weights in _chunks(averaged, weights):
        # The weights in the dtype of the average are a temporary, so they are taken piece by piece.
        cast = [torch.empty_like(mean) for mean in some_averaged]
        torch._foreach_copy_(cast, some_weights)
        torch._foreach_lerp_(some_averaged, cast, share)


def _chunks(left: list[Tensor], right: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Cut two lists into pieces of some MB, the size of a temporary: small tensors together, large ones in views.

    On a CPU a piece stays in the cache; on a GPU it is large enough to hide the launch of a kernel.
    """
    size = 1 << 18 if left and left[0].device.type == "cpu" else 1 << 22
    some_left: list[Tensor] = []
    some_right: list[Tensor] = []
    room = size
    for one, other in zip(left, right, strict=True):
        elements = one.numel()
        if elements > size and one.is_contiguous() and other.is_contiguous():
            views = (torch.split(tensor.view(-1), size) for tensor in (one, other))
            yield from (([piece], [other_piece]) for piece, other_piece in zip(*views, strict=True))
            continue
        if elements > room and some_left:
            yield some_left, some_right
            some_left, some_right, room = [], [], size
        some_left.append(one)
        some_right.append(other)
        room -= elements
    if some_left:
        yield some_left, some_right
