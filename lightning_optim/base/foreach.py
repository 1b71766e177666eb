"""Process long lists of tensors in chunks that fit into a cache, without temporaries of the size of the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def chunks(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Yield pieces of some lists, of some MB each, for a formula that needs a temporary of their size.

    Small tensors stand together in a piece, large ones are cut into views. On a CPU a piece stays in the cache; on a
    GPU it is large enough to hide the launch of a kernel.

    Args:
        lists: Lists of local tensors, such as :func:`local_shards` returns: of the same shapes, in the same order.

    Example::

        >>> weights, grads = [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(3)]
        >>> for some_weights, some_grads in chunks(weights, grads):
        ...     added = torch._foreach_add_(some_grads, torch._foreach_sign(some_weights))
        >>> grads
        [tensor([1., 1.]), tensor([1., 1., 1.])]
    """
    size = 1 << 18 if lists[0] and lists[0][0].device.type == "cpu" else 1 << 22
    together: list[tuple[Tensor, ...]] = []
    room = size
    for alike in zip(*lists, strict=True):
        elements = alike[0].numel()
        if elements > size and (flat := _flat(alike)):
            for views in zip(*(torch.split(tensor, size) for tensor in flat), strict=True):
                yield tuple([view] for view in views)
            continue
        if elements > room and together:
            yield tuple(map(list, zip(*together, strict=True)))
            together, room = [], size
        together.append(alike)
        room -= elements
    if together:
        yield tuple(map(list, zip(*together, strict=True)))


def _flat(alike: tuple[Tensor, ...]) -> list[Tensor] | None:
    """Return tensors as vectors if they lie in one memory format without gaps, such as channels last; else ``None``."""
    order = sorted(range(alike[0].ndim), key=alike[0].stride, reverse=True)
    permuted = [tensor.permute(order) for tensor in alike]
    return [tensor.view(-1) for tensor in permuted] if all(tensor.is_contiguous() for tensor in permuted) else None


@torch.no_grad()
def scale_(tensors: list[Tensor], factor: float) -> None:
    """Multiply tensors by a number in place, in half precision too by the number itself.

    On a CPU ``torch._foreach_mul_`` rounds the number to the dtype of a tensor: 0.999 is 1 in bfloat16.
    """
    coarse = [tensor for tensor in tensors if tensor.dtype.itemsize < 4 and tensor.device.type == "cpu"]
    for tensor in coarse:
        tensor.mul_(factor)
    if not coarse:
        torch._foreach_mul_(tensors, factor)
    elif len(coarse) < len(tensors):
        scale_([tensor for tensor in tensors if tensor.dtype.itemsize >= 4 or tensor.device.type != "cpu"], factor)


@torch.no_grad()
def swap_(left: Tensor, right: Tensor) -> None:
    """Swap the values of two local tensors of one dtype and shape, with a temporary of some MB."""
    for (some_left,), (some_right,) in chunks([left], [right]):
        kept = some_left.clone()
        some_left.copy_(some_right)
        some_right.copy_(kept)
