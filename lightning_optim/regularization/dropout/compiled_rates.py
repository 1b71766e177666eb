"""Keep the rates of compiled modules in tensors: a new number in the place of a rate compiles a module again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.base.dtypes import widest_dtype
from lightning_optim.base.schedules import Schedule
from lightning_optim.regularization.dropout.drop_block import DropBlock
from lightning_optim.regularization.dropout.drop_path import DropPath
from lightning_optim.regularization.dropout.masks import leading, mask
from lightning_optim.regularization.dropout.weight_drop import WeightDrop

LEVELS = 7
"""The most rates to which a schedule is rounded where a compiled layer takes a number only.

torch keeps eight programs of a function (``torch._dynamo.config.recompile_limit``), of which one is for evaluation, and
runs it uncompiled if it needs more.
"""

_MOST_STEPS = 10_000  # at which a schedule is asked for its values
_ALPHA = -1.7580993408473766  # the limit of SELU for small inputs, at which alpha dropout sets what it drops


def levels(schedule: Schedule, total: float) -> list[float]:
    """Return the few rates that a schedule is rounded to: all its values in the run, or else seven at equal distances.

    Example::

        >>> from lightning_optim import Linear, Piecewise
        >>> levels(Piecewise({0.0: 0.1, 0.3: 0.25, 0.5: 0.0}), total=100)
        [0.0, 0.1, 0.25]
        >>> [round(level, 2) for level in levels(Linear(0.0, 0.6), total=100)]
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    """
    last = int(total) - 1
    steps = range(last + 1) if last < _MOST_STEPS else (last * i // (_MOST_STEPS - 1) for i in range(_MOST_STEPS))
    values = sorted({schedule(step, total) for step in steps})
    if len(values) <= LEVELS:
        return values
    low, high = values[0], values[-1]
    return [low + (high - low) * level / (LEVELS - 1) for level in range(LEVELS)]


def rate_tensor(device: torch.device) -> Tensor:
    """Return a tensor for a rate, as exact as the number where the device can hold it."""
    return torch.zeros((), device=device, dtype=widest_dtype(device))


def forward_at(module: nn.Module, rate: Tensor) -> Callable[..., Any] | None:
    """Return a ``forward`` for a dropout module that reads its rate from a tensor.

    ``None`` for a module whose formula is not known here: attention, recurrent layers, classes of a user.
    """
    drop = _formula(module)
    if drop is None or "forward" in vars(module):
        return None

    def forward(*args: Any, **kwargs: Any) -> Any:
        if module.training:
            return drop(rate, *args, **kwargs)
        return original(*args, **kwargs)

    original = module.forward
    return forward


def _formula(module: nn.Module) -> Callable[..., Any] | None:
    kind = type(module)
    if isinstance(module, DropPath | DropBlock | WeightDrop) and kind.forward in _OURS:
        return module.drop
    if kind.forward in _ALPHA_CHANNELS:
        channels = _ALPHA_CHANNELS[kind.forward]
        return lambda rate, input: _alpha_drop(rate, input, channels)
    if kind.forward in _UNBATCHED:
        unbatched = _UNBATCHED[kind.forward]
        return lambda rate, input: _drop(rate, input, unbatched, bool(getattr(module, "inplace", False)))
    if kind.__name__.endswith("DropPath") and not list(module.children()) and not list(module.parameters()):
        return lambda rate, x: _drop_path(rate, x, bool(getattr(module, "scale_by_keep", True)))
    return None


_OURS = {DropPath.forward, DropBlock.forward, WeightDrop.forward}
# The number of dimensions of an input without a batch, where channels are dropped: torch lets 2d have none.
_UNBATCHED = {nn.Dropout.forward: None, nn.Dropout1d.forward: 2, nn.Dropout2d.forward: 0, nn.Dropout3d.forward: 4}
_ALPHA_CHANNELS = {nn.AlphaDropout.forward: False, nn.FeatureAlphaDropout.forward: True}


def _drop(rate: Tensor, input: Tensor, unbatched: int | None, inplace: bool) -> Tensor:
    like = input if unbatched is None else leading(input, 1 if input.ndim == unbatched else 2)
    factors = mask(like, rate)
    return input.mul_(factors) if inplace else input * factors


def _alpha_drop(rate: Tensor, input: Tensor, channels: bool) -> Tensor:
    """Set what is dropped to a negative number, then keep mean and variance (`arXiv:1706.02515`)."""
    rate = rate.to(input.device)
    kept = mask(leading(input, 2) if channels else input, rate) != 0.0
    scale = ((1.0 - rate) * (1.0 + rate * _ALPHA**2)).rsqrt()
    scale = torch.where(rate < 1.0, scale, 0.0)
    factors = torch.where(kept, scale, 0.0).to(input.dtype)
    return (
        input * factors
        + torch.where(kept, 0.0, scale * _ALPHA).to(input.dtype)
        - (scale * rate * _ALPHA).to(input.dtype)
    )


def _drop_path(rate: Tensor, x: Tensor, scale: bool) -> Tensor:
    factors = mask(leading(x, 1), rate)
    return x * (factors if scale else (factors != 0.0).to(x.dtype))
