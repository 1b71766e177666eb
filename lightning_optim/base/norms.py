"""Compute norms of tensors and sums of their rows, exact over shards.

Shards are summed over the ranks that hold different parts; replicated tensors count once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from lightning_optim.base.dtypes import accumulation_dtype
from lightning_optim.base.module_tensors import dimensions
from lightning_optim.base.shards import any_sharded, local_shards, sharded_dim


def total_norm(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    r"""Return the norm :math:`\lVert x \rVert_p` of all elements of all tensors, exact over shards.

    Shards are summed over the ranks that hold different parts. Replicated and plain tensors, which agree on all ranks,
    count once, also where a model has tensors of both kinds. Half precision is accumulated in fp32.

    Args:
        tensors: Plain tensors and DTensors of any placement, on any device.
        norm_type: Exponent p > 0; ``inf`` for the largest absolute value.

    Returns:
        A scalar on the device of the first tensor, the same on all ranks.

    Example::

        >>> total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(tensor_norms(tensors, norm_type), norm_type)


def tensor_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return the norm of each tensor by itself, exact over shards as in :func:`total_norm`, with one reduction.

    Args:
        tensors: Plain tensors and DTensors of any placement, on any device.
        norm_type: Exponent p > 0; ``inf`` for the largest absolute value.

    Returns:
        A vector with one entry for each tensor, on the device of the first, the same on all ranks.

    Example::

        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.tensor([[2.0]])])
        tensor([5., 2.])
    """
    if not tensors:
        return torch.zeros(0)
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1 and not any_sharded(tensors):
        return _foreach_norm(list(tensors), norm_type)
    parts = [_shard_and_groups(tensor) for tensor in tensors]
    alike: dict[tuple[torch.device, torch.dtype, tuple[dist.ProcessGroup, ...]], list[int]] = {}
    for position, (shard, over) in enumerate(parts):
        alike.setdefault((shard.device, shard.dtype, over), []).append(position)
    results: dict[int, Tensor] = {}
    for (_, _, over), positions in alike.items():
        some = _foreach_norm([parts[position][0] for position in positions], norm_type)
        for group in over:
            some = _over_ranks(some, norm_type, group)
        results.update(zip(positions, some.to(parts[0][0].device).unbind(), strict=True))
    widest = max((norm.dtype for norm in results.values()), key=lambda dtype: dtype.itemsize)
    return torch.stack([results[position].to(widest) for position in range(len(tensors))])


def row_sums(
    tensors: Sequence[Tensor], like: Sequence[Tensor] = (), *, squares: bool = False, dim: int = 0
) -> list[Tensor]:
    """Return the sums of the rows of each tensor, or of their squares, exact over shards.

    A row holds the weights of one output of a layer: all dimensions but the first. With ``dim=1`` it holds those of one
    input: all dimensions but the second. A vector or a scalar is one row. Each of stacked ensemble members has rows of
    its own.

    Args:
        tensors: Plain tensors and DTensors of any placement.
        like: Their parameters, if ``tensors`` are gradients: parameters know which dimension stacks ensemble members.
        squares: Sum the squares.
        dim: Dimension that numbers the rows, 0 or 1.

    Returns:
        The sums of each tensor, in fp32 or better, in a shape that broadcasts against its local part.

    Example::

        >>> row_sums([torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
        [tensor([[3.],
                [7.]])]
    """
    sums: list[Tensor] = []
    cut: dict[dist.ProcessGroup, list[int]] = {}
    for position, (tensor, parameter) in enumerate(zip(tensors, like or tensors, strict=True)):
        dims = row_dims(parameter, dim)
        shard, dtype = local_shards([tensor])[0], accumulation_dtype(tensor.dtype)
        if not dims:
            sums.append(shard.to(dtype).abs().square() if squares else shard.to(dtype, copy=True))
        elif squares:
            sums.append(torch.linalg.vector_norm(shard, 2.0, dim=dims, keepdim=True, dtype=dtype).square())
        else:
            sums.append(shard.sum(dim=dims, keepdim=True, dtype=dtype))
        if isinstance(tensor, DTensor):
            for mesh_dim, placement in enumerate(tensor.placements):
                if sharded_dim(placement) in dims:
                    cut.setdefault(tensor.device_mesh.get_group(mesh_dim), []).append(position)
    for group, positions in cut.items():
        flat = torch.cat([sums[position].flatten() for position in positions])
        dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [sums[position].numel() for position in positions])
        for position, piece in zip(positions, pieces, strict=True):
            sums[position] = piece.view_as(sums[position])
    return sums


def row_dims(parameter: Tensor, dim: int = 0) -> list[int]:
    """Return the dimensions that make up a row, for :func:`row_sums`; an empty list for a scalar."""
    members = parameter.ndim - dimensions(parameter)
    numbering = members + dim if dimensions(parameter) >= 2 else None
    return [own for own in range(members, parameter.ndim) if own != numbering]


def nonzero_counts(tensors: Sequence[Tensor]) -> Tensor:
    """Return the number of elements of each tensor that are not zero, exact over shards, with one reduction.

    Args:
        tensors: Plain tensors and DTensors of any placement, on any device.

    Returns:
        A vector of int64 on the device of the first tensor, the same on all ranks.

    Example::

        >>> nonzero_counts([torch.tensor([0.0, 4.0]), torch.zeros(2, 2)])
        tensor([1, 0])
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    local = local_shards(tensors)
    device = local[0].device
    return sum_over_shards_(torch.stack([torch.count_nonzero(shard).to(device) for shard in local]), tensors)


def sum_over_shards_(sums: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Add up numbers that each process has computed of its shard of each tensor, in place, with one reduction a group.

    Args:
        sums: A vector with one number for each tensor.
        tensors: Plain tensors and DTensors, none of them ``Partial``.

    Returns:
        ``sums``, now the same on all ranks.
    """
    over = [_groups_of(tensor) for tensor in tensors]
    for group in dict.fromkeys(group for groups in over for group in groups):
        places = [place for place, groups in enumerate(over) if group in groups]
        cut = sums[places]
        dist.all_reduce(cut, group=group)
        sums[places] = cut
    return sums


def _shard_and_groups(tensor: Tensor) -> tuple[Tensor, tuple[dist.ProcessGroup, ...]]:
    """Return the local part, and the process groups over which the parts add up to the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, ()
    if any(placement.is_partial() for placement in tensor.placements):
        whole = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        tensor = tensor.redistribute(placements=whole)
    return tensor.to_local(), _groups_of(tensor)


def _groups_of(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups over which the shards add up to the whole."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh: DeviceMesh = tensor.device_mesh
    sharded = (dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return tuple(mesh.get_group(dim) for dim in sharded)


def _foreach_norm(shards: list[Tensor], norm_type: float) -> Tensor:
    if math.isinf(norm_type):
        # An empty shard has no largest element, and torch raises an error for it.
        shards = [shard if shard.numel() else shard.new_zeros(1) for shard in shards]
    return torch.stack(torch._foreach_norm(shards, norm_type, dtype=accumulation_dtype(shards[0].dtype)))


def _over_ranks(norms: Tensor, norm_type: float, group: dist.ProcessGroup) -> Tensor:
    if math.isinf(norm_type):
        dist.all_reduce(norms, op=dist.ReduceOp.MAX, group=group)
        return norms
    power = norms.pow(norm_type)
    dist.all_reduce(power, group=group)
    return power.pow(1.0 / norm_type)
