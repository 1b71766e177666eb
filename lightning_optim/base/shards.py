"""Work on the local shards of sharded tensors, and copy between placements.

A model under FSDP2 or tensor parallelism holds :class:`~torch.distributed.tensor.DTensor` parameters, perhaps beside
plain ones. Element-wise formulas are applied to the local shards (:func:`local_shards`); for formulas over several
elements see :mod:`lightning_optim.base.norms`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, distribute_tensor


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the part of each tensor that this process holds, live: a DTensor's shard, else the tensor itself.

    Example::

        >>> local_shards([torch.ones(2)])
        [tensor([1., 1.])]
    """
    listed = list(tensors)
    return [t.to_local() if isinstance(t, DTensor) else t for t in listed] if any_sharded(listed) else listed


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return True if any tensor is a DTensor."""
    # Checking each of hundreds of small tensors would cost as much as the work on them: check their types.
    return any(issubclass(kind, DTensor) for kind in set(map(type, tensors)))


def sharded_dim(placement: Placement) -> int | None:
    """Return the dimension that a placement cuts into shards; ``None`` if each process holds all of it.

    With tensor parallelism FSDP2 has a placement of its own, which is no subclass of ``Shard``.
    """
    return None if placement.is_replicate() or placement.is_partial() else placement.dim  # type: ignore[attr-defined]


def placed_as(shard: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor from this process's ``shard`` of it, placed as ``like``, without communication."""
    if not isinstance(like, DTensor):
        return shard
    # Without shape and stride, torch assumes that all shards have the same size.
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def align_grad_(parameter: Tensor) -> Tensor | None:
    """Give ``parameter.grad`` the placement of its parameter, or coalesce it if it is sparse, and return it.

    Under sequence parallelism the gradient of a LayerNorm is ``Partial``: each rank holds a summand, and a number added
    to the local part would count once per rank. A sparse gradient may hold several summands for a row.
    """
    grad = parameter.grad
    if grad is not None and grad.is_sparse:
        parameter.grad = grad = grad.coalesce()
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad = grad.redistribute(placements=parameter.placements)
    return grad


def version(tensor: Tensor) -> int:
    """Return a number that grows when the tensor is written to in place; below 0 for an inference tensor."""
    return sum(versions([tensor]))


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return version numbers: writing to one of the tensors in place makes one of them grow.

    torch counts the writes to a DTensor with the DTensor, and those to its shard with the shard. An inference tensor
    has no count: -1.
    """
    counting = [*tensors, *local_shards(tensors)] if any_sharded(tensors) else tensors
    try:
        return [tensor._version for tensor in counting]
    except RuntimeError:  # checking each tensor first would cost as much as reading its version
        return [-1 if tensor.is_inference() else tensor._version for tensor in counting]


def reshard_(module: nn.Module) -> None:
    """Put every FSDP2 module back to its shards.

    After a forward without a backward (validation) the root group is still gathered: the next training step would run
    on the gathered weights, and ignore what is written into the shards. A no-op for a module without FSDP2.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


@torch.no_grad()
def copy_(target: Tensor, source: Tensor) -> None:
    """Copy ``source`` into ``target`` in place, whole tensors into shards too.

    Args:
        target: A plain tensor or a DTensor.
        source: A tensor of the same global shape, of any dtype and device: a DTensor of the target's placement, or the
            whole tensor, of which each rank takes its part without communication.
    """
    if not isinstance(target, DTensor):
        target.copy_(source)
        return
    ours = target.to_local()
    ours.copy_(source.to_local() if isinstance(source, DTensor) else shard_of(source.to(ours.device), target))


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor: a sharded one is gathered, which every rank of its mesh must do; else the tensor itself.

    Gather one tensor at a time, so that memory does not hold a whole model.

    Example::

        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_of(full: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process holds if it is placed as ``like``, without communication.

    Example::

        >>> shard_of(torch.ones(2), like=torch.zeros(2))
        tensor([1., 1.])
    """
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def gather_to_cpu(tensor: Tensor) -> Tensor:
    """Copy the whole tensor to the CPU. For a DTensor this is a collective: every rank of its mesh must call it."""
    return whole(tensor.detach()).to("cpu", copy=True)  # a replicated tensor is returned as live storage
