"""Find the parameters and buffers of a module, and their names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim.base.module_registry import buffer_names, buffer_of, is_persistent


def dimensions(parameter: Tensor) -> int:
    """Return the number of dimensions, without one that stacks ensemble members (``parameter.member_dim``)."""
    return parameter.ndim - (getattr(parameter, "member_dim", None) is not None)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer of ``module`` under all its names in a plain ``state_dict()``.

    It does not call ``state_dict()``, which users override to leave frozen weights out of their checkpoints. Call
    :func:`reshard_` before. The tensors are live storage.
    """
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key in buffer_names(owner):
            buffer = buffer_of(owner, key)
            if buffer is not None and is_persistent(owner, key):
                named[f"{prefix}.{key}" if prefix else key] = buffer
    return named


def buffer_places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the plain name of each buffer, also of one that is ``None``, its owner, and its key there."""
    for prefix, owner in module.named_modules():
        for key in buffer_names(owner):
            yield plain_name(f"{prefix}.{key}" if prefix else key), owner, key


def plain_name(name: str) -> str:
    """Return the name without the part that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "")


def writable_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return those of :func:`named_tensors` that can be written in place, by their plain names.

    The rest are expanded tensors, whose elements share memory, sparse ones, and lazy parameters without data.
    """
    return {plain_name(name): tensor for name, tensor in named_tensors(module).items() if is_writable(tensor)}


def is_writable(tensor: Tensor) -> bool:
    """Return True if a tensor can be written in place: no two of its elements share memory, and it has data."""
    if is_lazy(tensor) or tensor.layout is not torch.strided:
        return False
    return all(stride or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def frozen_names(module: nn.Module) -> set[str]:
    """Return the plain names of the tensors that no optimizer moves.

    These are parameters that require no gradient, and the buffers of submodules in which no parameter requires one.
    """
    trained = {
        prefix
        for prefix, owner in module.named_modules(remove_duplicate=False)
        if any(parameter.requires_grad for parameter in owner.parameters())
    }
    named = named_tensors(module).items()
    return {
        plain_name(name)
        for name, tensor in named
        if not (tensor.requires_grad if isinstance(tensor, nn.Parameter) else name.rpartition(".")[0] in trained)
    }


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Map the ``id`` of each parameter and persistent buffer to its first name. Call :func:`reshard_` before."""
    return {id(tensor): name for name, tensor in reversed(named_tensors(module).items())}
