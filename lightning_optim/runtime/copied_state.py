"""Copy a ``state_dict`` in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def copied_state(state: Any, device: torch.device | str | None = None) -> Any:
    """Return a deep copy whose tensors share no memory with those of ``state``, and need no gradient.

    Args:
        state: Dictionaries, lists and tuples of tensors and other values.
        device: Device of the copied tensors. Default: that of each tensor. A sharded one stays on its mesh's device.
    """

    def copy_of(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.clone() if isinstance(tensor, DTensor) else tensor.to(device or tensor.device, copy=True)

    return copy.deepcopy(state, {id(tensor): copy_of(tensor) for tensor in _tensors(state)})


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)
