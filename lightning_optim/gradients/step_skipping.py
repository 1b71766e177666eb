"""Decide which optimizer steps are skipped, and count those that a GradScaler skipped by itself."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.base.ring_buffer import Ring

Reason: TypeAlias = Literal["nonfinite", "spike"]

_HISTORY = 100  # Number of norms whose median a spike is measured against.
_WARMUP = 10  # The median of fewer norms says little.


class NormCheck:
    """Decide whether to skip a step: its gradient norm is not finite, or far above recent norms.

    Args:
        finite: True to skip a step whose norm is NaN or infinite.
        spike: Skip a step whose norm is more than this factor times the median of the last 100 norms, once there are
            10; ``None`` skips no such step.

    Example::

        >>> check = NormCheck(finite=True, spike=5.0)
        >>> [check.check(torch.tensor(norm)) for norm in [1.0] * 10 + [4.0, 6.0, float("nan")]][-3:]
        [(None, 4.0), ('spike', 6.0), ('nonfinite', nan)]
    """

    def __init__(self, finite: bool, spike: float | None) -> None:
        self.finite, self.spike = finite, spike
        self._norms = Ring(_HISTORY)

    @torch.no_grad()
    def check(self, norm: Tensor, ranks: int = 1) -> tuple[Reason | None, float]:
        """Return the reason to skip the step, or ``None``, and the norm on the host.

        It costs one read from the device. With several ranks there is one reduction, so that all of them decide alike:
        if the norm of another rank is not finite, NaN is returned.
        """
        signed = norm
        if self.spike is not None and self._norms.count >= _WARMUP:
            is_spike = norm > self.spike * self._norms.quantile(0.5).squeeze()
            signed = torch.where(is_spike, -norm, norm)  # one number holds both answers
        if ranks > 1:
            signed = self._worst(signed)
        value = float(signed)
        if not math.isfinite(value):
            return ("nonfinite" if self.finite else None), value
        if value < 0.0:
            return "spike", -value
        if self.spike is not None:
            self._norms.append(norm.reshape(1))
        return None, value

    def _worst(self, signed: Tensor) -> Tensor:
        """Return NaN if the norm of any rank is not finite, and a negative norm if that of any rank is a spike."""
        code = torch.where(signed.isfinite(), (signed < 0.0).to(torch.int32), 2)
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return torch.where(code == 2, torch.nan, torch.where(code == 1, -signed.abs(), signed))

    def state_dict(self) -> dict[str, Any]:
        """Return the recent norms."""
        return self._norms.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self._norms.load_state_dict(state)


class SkippedSteps:
    """Count, by optimizer, the steps that had gradients and did not happen.

    A GradScaler skipped them, or a callback dropped them. No hook says that a scaler skipped a step, and asking the
    scaler would wait for the device; but then no step follows the hooks before it.

    Example::

        >>> skipped = SkippedSteps()
        >>> skipped.before_step(0); skipped.after_step(0); skipped.before_step(1)
        >>> skipped.pop()
        {1: 1}
        >>> skipped.pop()
        {}
    """

    def __init__(self) -> None:
        self._pending: Counter[int] = Counter()

    def before_step(self, optimizer: int) -> None:
        """Expect a step; call it before a step that has gradients."""
        self._pending[optimizer] += 1

    def after_step(self, optimizer: int) -> None:
        """Note that the expected step happened."""
        self._pending[optimizer] -= 1

    def pop(self) -> dict[int, int]:
        """Return the number of skipped steps of each optimizer since the last call; call it at the end of a batch."""
        skipped = {optimizer: count for optimizer, count in self._pending.items() if count > 0}
        self._pending.clear()
        return skipped
