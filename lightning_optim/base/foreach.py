"""Process long lists of tensors in chunks that fit into a cache, without temporaries of the size of the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


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
    if left and sum(map(Tensor.numel, left)) <= size:
        yield left, right
        return
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
    """Swap the values of two local tensors of one dtype and shape, with a temporary of some MB."""
    for (some_left,), (some_right,) in chunks([left], [right]):
        kept = some_left.clone()
        some_left.copy_(some_right)
        some_right.copy_(kept)
