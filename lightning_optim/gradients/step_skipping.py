"""Whether the gradients of a step can be used: not if their norm is not finite, nor if it is far above recent ones."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.base.ring_buffer import Ring

Verdict: TypeAlias = Literal["fine", "spike", "nonfinite"]

_MEMORY = 100  # Steps whose median norm a spike is measured against.
_WARMUP = 10  # Of fewer norms the median says little.


class Guard:
    """Judges the norms of one optimizer's gradients.

    Args:
        finite: Whether a norm that is NaN or infinite is refused.
        spike: If given, the factor over the recent median above which a norm is refused.

    Example::

        >>> guard = Guard(finite=True, spike=5.0)
        >>> [guard.judge(torch.tensor(norm)) for norm in [1.0] * 10 + [4.0, 6.0, float("nan")]][-3:]
        [('fine', 4.0), ('spike', 6.0), ('nonfinite', nan)]
    """

    def __init__(self, finite: bool, spike: float | None) -> None:
        self.finite, self.spike = finite, spike
        self._recent = Ring(_MEMORY)

    @torch.no_grad()
    def judge(self, norm: Tensor, ranks: int = 1) -> tuple[Verdict, float]:
        """The worst that any rank finds, and the norm, with one read from the device.

        For several ranks there is one reduction. If another rank's norm is not finite, NaN stands for it.
        """
        told = norm
        if self.spike is not None and self._recent.count >= _WARMUP:
            spikes = norm > self.spike * self._recent.quantile(0.5).squeeze()
            told = torch.where(spikes, -norm, norm)  # so that one number tells both
        if ranks > 1:
            told = self._worst(told)
        value = float(told)
        if not math.isfinite(value):
            return ("nonfinite" if self.finite else "fine"), value
        if value < 0.0:
            return "spike", -value
        if self.spike is not None:
            self._recent.append(norm.reshape(1))
        return "fine", value

    def _worst(self, told: Tensor) -> Tensor:
        """What all ranks go by: NaN if any rank's is not finite, negative if any rank's is."""
        code = torch.where(told.isfinite(), (told < 0.0).to(torch.int32), 2)
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return torch.where(code == 2, torch.nan, torch.where(code == 1, -told.abs(), told))

    def state_dict(self) -> dict[str, Any]:
        """The recent norms."""
        return self._recent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._recent.load_state_dict(state)
