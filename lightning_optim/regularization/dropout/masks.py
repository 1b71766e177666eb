"""Draw the masks of dropout, at a rate that is a number or, for compiled modules, a tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad


def mask(like: Tensor, rate: float | Tensor) -> Tensor:
    """Return a Bernoulli mask of 0 and :math:`1 / (1 - rate)`, like ``like`` in shape, dtype and device; its mean is 1.

    For a complex tensor it is real.

    Args:
        like: The tensor that the mask is for.
        rate: A number in [0, 1]; or a tensor without dimensions, whose value a compiled program reads at each run.

    Example::

        >>> round(mask(torch.empty(100_000), 0.2).mean().item(), 1)
        1.0
    """
    dtype = like.real.dtype if like.is_complex() else like.dtype  # `dtype.to_real()` would end a compiled graph
    if isinstance(rate, Tensor):
        keep = 1.0 - rate.to(like.device)
        drawn = torch.rand_like(like, dtype=torch.float32) < keep
        return torch.where(drawn, 1.0 / keep, 0.0).to(dtype)
    if rate >= 1.0:
        return torch.zeros_like(like, dtype=dtype)
    return torch.empty_like(like, dtype=dtype).bernoulli_(1.0 - rate).div_(1.0 - rate)


def leading(like: Tensor, dims: int) -> Tensor:
    """Return an empty tensor to draw a mask for the first dimensions of ``like``, which broadcasts over the rest.

    Example::

        >>> leading(torch.zeros(2, 3, 4), 1).shape
        torch.Size([2, 1, 1])
    """
    return like.new_empty(*like.shape[:dims], *[1] * (like.ndim - dims))


def block_mask(like: Tensor, rate: float | Tensor, block_size: int) -> Tensor:
    """Return the mask of DropBlock for feature maps: squares of zeros, and elsewhere one number; its mean is 1.

    Args:
        like: The feature maps, ``[N, C, H, W]``. Each map has blocks of its own.
        rate: The share of a map that is dropped, as in :func:`mask`.
        block_size: Side of a block; it is cut to the size of the map.

    Example::

        >>> sorted(set(block_mask(torch.empty(1, 1, 8, 8), 1.0, 3).flatten().tolist()))
        [0.0]
    """
    if not isinstance(rate, Tensor) and rate >= 1.0:
        return torch.zeros_like(like)
    height, width = like.shape[-2:]
    size = min(block_size, height, width)
    shape = (*like.shape[:-2], height - size + 1, width - size + 1)
    rate = rate.to(like.device) if isinstance(rate, Tensor) else rate
    chance = rate * (height * width) / (size**2 * shape[-2] * shape[-1])
    kept = 1.0 - covered((torch.rand(shape, device=like.device) < chance).float(), size)
    if isinstance(rate, Tensor):
        kept = torch.where(rate < 1.0, kept, 0.0)
    return (kept * (kept.numel() / kept.sum().clamp(min=1.0))).to(like.dtype)


def covered(seeds: Tensor, size: int) -> Tensor:
    """Return the places that blocks cover, as ones: the block of a seed at (i, j) begins there.

    Args:
        seeds: 1 where a block begins, else 0: ``[N, C, H - size + 1, W - size + 1]``, so that blocks lie in the map.
        size: Side of a block.

    Example::

        >>> covered(torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]]), size=2)
        tensor([[[[0., 1., 1.],
                  [0., 1., 1.],
                  [0., 0., 0.]]]])
    """
    return max_pool2d(pad(seeds, [size - 1] * 4), size, stride=1)
