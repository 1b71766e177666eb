"""Process long lists of tensors in chunks that fit into a cache, without temporaries of the size of the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements of the temporary in `swap_`: 4 MB in fp32, large enough to be bound by memory


def chunks(left: list[Tensor], right: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield pieces of two lists, of some MB each, for a formula that needs a temporary of their size.

    Small tensors stand together in a piece, large ones are cut into views. On a CPU a piece stays in the cache; on a
    GPU it is large enough to hide the launch of a kernel.

    Args:
        left: Local tensors, such as :func:`local_shards` returns.
        right: Tensors of the same shapes, in the same order.

    Example::

        >>> weights, grads = [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(3)]
        >>> for some_weights, some_grads in chunks(weights, grads):
        ...     added = torch._foreach_add_(some_grads, torch._foreach_sign(some_weights))
        >>> grads
        [tensor([1., 1.]), tensor([1., 1., 1.])]
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
    """Return both as vectors, if they lie in one memory format without gaps, such as channels last; else ``None``."""
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
