"""Process long lists of tensors in chunks that fit into a cache, without temporaries of the size of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements of the temporary in `swap_`: 4 MB in fp32, large enough to be bound by memory


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums and averages of ``tensor`` are kept: fp32 for half precision, else its own.

    In bf16 an average with a decay of 0.999 never moves, since its increments are below the last bit.
    """
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the floating-point dtype with the most digits that the device has: fp64, or fp32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def has_mean(value: Any) -> bool:
    """Return True if ``value`` is a tensor of real or complex floating-point numbers, which have a mean."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def chunks(left: list[Tensor], right: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Cut two lists into pieces of some MB, the size of a temporary: small tensors together, large ones in views.

    On a CPU a piece stays in the cache; on a GPU it is large enough to hide the launch of a kernel.
    """
    size = 1 << 18 if left and left[0].device.type == "cpu" else 1 << 22
    some_left: list[Tensor] = []
    some_right: list[Tensor] = []
    room = size
    for one, other in zip(left, right, strict=True):
        elements = one.numel()
        if elements > size and (flat := _flat(one, other)):
            views = (torch.split(tensor, size) for tensor in flat)
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


def _flat(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both as vectors, element by element, if they lie in one memory format without gaps, such as channels last."""
    order = sorted(range(one.ndim), key=one.stride, reverse=True)
    one, other = one.permute(order), other.permute(order)
    return (one.view(-1), other.view(-1)) if one.is_contiguous() and other.is_contiguous() else None


@torch.no_grad()
def swap_(left: Tensor, right: Tensor) -> None:
    """Swap the values of two local tensors of one dtype, device and shape, with a temporary of a few MB at most."""
    flat = _flat(left, right)
    pairs = zip(*(torch.split(tensor, _CHUNK) for tensor in flat), strict=True) if flat else [(left, right)]
    for a, b in pairs:
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
