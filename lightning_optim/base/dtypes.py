"""Choose the dtypes in which sums and averages are kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


def accumulation_dtype(own: torch.dtype, wanted: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype in which a sum or an average of tensors is kept: fp32 for a narrower dtype, else its own.

    In bf16 an average with a decay of 0.999 never moves, since its increments are below the last bit.

    Args:
        own: Dtype of the tensors; one that has no mean is returned as it is.
        wanted: If given, the floating dtype to use instead; for complex tensors the complex one of its width.

    Example::

        >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    if not (own.is_floating_point or own.is_complex):
        return own
    if wanted is None:
        narrow = own.itemsize < (8 if own.is_complex else 4)  # a complex number has two parts
        return own if not narrow else torch.complex64 if own.is_complex else torch.float32
    if own.is_complex:
        # Not in complex half precision, for which torch has few operations.
        return torch.complex128 if wanted.itemsize == 8 else torch.complex64
    return wanted


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the floating-point dtype with the most digits that the device has: fp64, or fp32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def real_zeros_like(tensor: Tensor) -> Tensor:
    """Return zeros for a sum of squares of each element, which is real: in fp32 or better, placed as the tensor.

    Example::

        >>> real_zeros_like(torch.ones(2, dtype=torch.complex64))
        tensor([0., 0.])
    """
    return torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype).to_real(), requires_grad=False)


def has_mean(value: Any) -> bool:
    """Return True if ``value`` is a tensor of real or complex floating-point numbers, which have a mean."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that it computes in the dtypes of its tensors, also within autocast.

    Under manual optimization a step is made within ``training_step``, and so within autocast, which would compute the
    matrix products of a formula in half precision.

    Example::

        >>> product = without_autocast(torch.mm)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     product(torch.ones(2, 2), torch.ones(2, 2)).dtype
        torch.float32
    """

    @wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, _AUTOCAST):
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return computed
