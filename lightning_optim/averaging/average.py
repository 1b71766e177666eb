"""What an average of weights is."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.base import foreach, shards
from lightning_optim.base.policy import Policy


class Average(Policy, abc.ABC):
    """An average of the weights over the optimizer steps, one copy of it for each optimizer.

    The averaged tensors are live storage with the shapes and placements of the weights, in fp32 where the weights are
    in half precision (:meth:`keep_in` changes that): in bf16 the increments of a slow average are below the last bit.
    Their values may be exchanged with those of the weights, and back, between two updates.

    A new average is a subclass with :meth:`update_`, which keeps its tensors in ``self._averaged`` and what it counts
    in ``self._counters``. Everything else is here::

        >>> class Last(Average):
        ...     def update_(self, weights, *, step):
        ...         self._begin(weights, step)
        >>> average = Last()
        >>> average.started
        False
        >>> average.update_([torch.ones(2)], step=1)
        >>> average.averaged
        [tensor([1., 1.])]
    """

    identity_args: ClassVar[tuple[str, ...]] = ()
    smooths_statistics: ClassVar[bool] = False
    """Whether running statistics may be averaged like weights: the weights taken in are close to one another."""
    keep_wide: bool = False
    """Whether no tensor is kept in a narrower dtype than its own, whatever :meth:`keep_in` says."""

    def __init__(self) -> None:
        self._dtype: torch.dtype | None = None
        self._device: torch.device | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next update is the first."""
        self._averaged: list[Tensor] = []
        self._counters: dict[str, int] = {}
        self._prepared: tuple[Any, list[Tensor], list[Tensor], bool] | None = None

    def keep_in(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        """How the tensors are kept, from the first update on.

        Args:
            dtype: A floating dtype; complex weights take the complex one of its width. ``None``: fp32 for what is
                narrower, else the weight's own.
            device: ``None``: where the weight is.
        """
        self._dtype, self._device = dtype, device

    @abc.abstractmethod
    def update_(self, weights: Sequence[Tensor], *, step: int) -> None:
        """Take in the weights. One step counts once, whatever is given.

        Args:
            weights: Plain tensors or DTensors, floating or complex; the same ones in the same order at every call. Of a
                tuple, which cannot change, the checks are made once.
            step: The number of optimizer steps made so far. It never decreases.
        """

    @property
    def averaged(self) -> list[Tensor]:
        """The average of each tensor, as live storage; empty before the first update."""
        return self._averaged

    @property
    def memory(self) -> list[list[Tensor]]:
        """What is remembered beside the average, each as long as the weights; live storage."""
        return []

    @property
    def started(self) -> bool:
        """Whether there was an update. What never started holds nothing that could be used."""
        return bool(self._counters)

    @property
    def counters(self) -> dict[str, int]:
        """What is remembered beside the tensors: the number of updates, the first and the last step."""
        return dict(self._counters)

    def load(
        self, counters: dict[str, int], averaged: Sequence[Tensor], memory: Sequence[Sequence[Tensor]] = ()
    ) -> None:
        """Take over counters and tensors, which become this average's own storage.

        Args:
            counters: What :attr:`counters` was.
            averaged: What :attr:`averaged` was, with the placements of the weights.
            memory: What :attr:`memory` was.
        """
        self._counters, self._averaged, self._prepared = dict(counters), list(averaged), None

    def extend(self, weights: Sequence[Tensor]) -> None:
        """Average more weights from now on: weights that did not move since the first update, such as frozen ones."""
        self._averaged += [self.copy_of(weight) for weight in weights]
        self._prepared = None

    def state_dict(self) -> dict[str, Any]:
        """Counters and averaged tensors, which are live storage, as in :meth:`torch.nn.Module.state_dict`."""
        return {"counters": self.counters, "averaged": list(self.averaged), "memory": [list(m) for m in self.memory]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a copy of what :meth:`state_dict` returned."""
        memory = [[tensor.clone() for tensor in remembered] for remembered in state["memory"]]
        self.load(state["counters"], [tensor.clone() for tensor in state["averaged"]], memory)

    def copy_of(self, weight: Tensor) -> Tensor:
        """A copy with the shape and placement of a weight, kept as :meth:`keep_in` says."""
        weight = weight.detach()
        (shard,) = shards.local_shards([weight])
        device = shard.device if self._device is None else self._device
        dtype = kept_dtype(weight.dtype, self._dtype)
        dtype = torch.promote_types(dtype, weight.dtype) if self.keep_wide else dtype
        return shards.placed_as(shard.to(device, dtype, copy=True), weight)

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not take the weights with it."""
        return {**self.__dict__, "_prepared": None}

    # ---- for subclasses ----------------------------------------------------------------------------------------------

    def _begin(self, weights: Sequence[Tensor], step: int) -> None:
        """The first update: copy the weights."""
        self._averaged, self._prepared = [self.copy_of(weight) for weight in weights], None
        self._counters = {"updates": 1, "first": step, "last": step}

    def _since(self, step: int) -> int:
        """The steps since the last update."""
        since = step - self._counters["last"]
        if since < 0:
            raise ValueError(f"`step` must not decrease, got {step} after {self._counters['last']}")
        return since

    def _move_(self, weights: Sequence[Tensor], step: int, share: float) -> None:
        """Move every average by a share of the way to its weight, and count."""
        ours, theirs, alike = self._pairs(weights)
        if alike:
            if ours:
                torch._foreach_lerp_(ours, theirs, share)
        else:
            for some, others in foreach.chunks(ours, theirs):
                # The weights in the dtype of the average are a temporary, so they are taken piece by piece.
                cast = [torch.empty_like(mean) for mean in some]
                torch._foreach_copy_(cast, others)
                torch._foreach_lerp_(some, cast, share)
        self._counters["updates"] += 1
        self._counters["last"] = step

    def _pairs(self, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], bool]:
        """The local parts of averages and weights, and whether they agree in dtype and device."""
        if self._prepared is not None and self._prepared[0] is weights:
            return self._prepared[1:]
        ours, theirs = shards.local_shards(self._averaged), shards.local_shards(weights)
        alike = all(a.dtype == b.dtype and a.device == b.device for a, b in zip(ours, theirs, strict=True))
        if isinstance(weights, tuple) and not any(isinstance(weight, DTensor) for weight in weights):
            self._prepared = weights, ours, theirs, alike
        return ours, theirs, alike


def kept_dtype(own: torch.dtype, wanted: torch.dtype | None = None) -> torch.dtype:
    """In which dtype an average of tensors of dtype ``own`` is kept: see :meth:`Average.keep_in`."""
    if wanted is None:
        narrow = own.itemsize < (8 if own.is_complex else 4)  # complex: both parts
        return own if not narrow else torch.complex64 if own.is_complex else torch.float32
    if own.is_complex:
        return torch.complex128 if wanted.itemsize == 8 else torch.complex64  # torch computes little in complex half
    return wanted
