"""Define the base class of averages of weights over optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.base import foreach, shards
from lightning_optim.base.dtypes import accumulation_dtype, without_autocast
from lightning_optim.base.policy import Policy


class Average(Policy):
    """Base class of averages of the weights over the optimizer steps; each optimizer has a copy of its own.

    The averaged tensors are live storage with the shapes and placements of the weights, in fp32 where the weights are
    in half precision (:meth:`keep_in` changes that): in bf16 the increments of a slow average are below the last bit.
    Their values may be swapped with those of the weights, and back, between two updates.

    A new average is a subclass with ``_share``: the share of the way by which an update moves the average towards the
    weights. The first update copies the weights. Counters, tensors, checkpoints and sharding belong to this class::

        >>> class Mean(Average):
        ...     '''The mean of all weights.'''
        ...     def _share(self, step):
        ...         return 1.0 / (self.counters["updates"] + 1)
        >>> average = Mean()
        >>> average.started
        False
        >>> for step in (1, 2, 3):
        ...     average.update_([torch.tensor([float(step)])], step=step)
        >>> average.averaged
        [tensor([2.])]

    An average of another form overrides :meth:`update_`, keeps its tensors in ``self._averaged`` and counts in
    ``self._counters``.

    For a Trainer: ``Trainer(callbacks=[WeightAveraging(Mean())])``.
    """

    identity_args: ClassVar[tuple[str, ...]] = ()
    used_in = "WeightAveraging({})"
    formulas = (("_share", "update_"),)
    smooths_statistics: ClassVar[bool] = False
    """True if running statistics may be averaged like weights: the weights taken in are close to one another."""
    keep_wide: bool = False
    """True if no tensor is kept in a narrower dtype than its own, even if :meth:`keep_in` asks for it."""

    _counters: dict[str, int]

    def __init__(self) -> None:
        self._dtype: torch.dtype | None = None
        self._device: torch.device | None = None
        self.add_state("_counters", {})
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next update is the first."""
        super().reset()
        self._set_tensors([], [])

    def _set_tensors(self, averaged: list[Tensor], memory: list[list[Tensor]]) -> None:
        self._averaged, self._memory = averaged, memory
        self._outdated = False  # True if the average is older than the memory: it is computed when it is asked for
        self._prepared: tuple[Any, list[Tensor], list[Tensor], bool] | None = None

    def keep_in(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        """Set dtype and device of the tensors that are kept, from the first update on.

        Args:
            dtype: A floating dtype; complex weights take the complex one of its width. ``None``: fp32 for narrower
                weights, else the weight's own.
            device: A device; ``None``: that of the weight.
        """
        self._dtype, self._device = dtype, device

    @torch.no_grad()
    @without_autocast
    def update_(self, weights: Sequence[Tensor], *, step: int) -> None:
        """Update the average with the weights. Nothing happens if there was no step since the last update.

        Args:
            weights: Plain tensors or DTensors, floating or complex; the same ones in the same order at every call. A
                tuple is checked only once, since it cannot change.
            step: Number of optimizer steps made so far. It never decreases.
        """
        if not self.started:
            self._begin(weights, step)
        elif self._since(step):
            self._move_(weights, step, self._share(step))

    def _share(self, step: int) -> float:
        """Return the share of the way, in [0, 1], by which to move from the average to the weights; to be overridden.

        Args:
            step: Number of optimizer steps made so far, larger than ``self.counters["last"]``. The counters are those
                before this update, which is never the first one.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `_share(self, step)`")

    def unreached(self, steps: int) -> str:
        """Return a sentence if an argument cannot act in so many optimizer steps from the first update; else "".

        It names the argument, how far it gets, and what to pass instead.
        """
        return ""

    @property
    def averaged(self) -> list[Tensor]:
        """The average of each tensor, as live storage; empty before the first update."""
        if self._outdated:
            self._compute_()
            self._outdated = False
        return self._averaged

    @property
    def memory(self) -> list[list[Tensor]]:
        """Tensors that are kept beside the average, in rows as long as the weights; live storage."""
        return self._memory

    @property
    def started(self) -> bool:
        """True if there was an update."""
        return bool(self._counters)

    @property
    def counters(self) -> dict[str, int]:
        """Number of updates, the first and the last step, as ``updates``, ``first`` and ``last``; empty before."""
        return dict(self._counters)

    def load(
        self, counters: dict[str, int], averaged: Sequence[Tensor], memory: Sequence[Sequence[Tensor]] = ()
    ) -> None:
        """Load counters and tensors, which become this average's own storage.

        Args:
            counters: An earlier value of :attr:`counters`.
            averaged: An earlier value of :attr:`averaged`, with the placements of the weights.
            memory: An earlier value of :attr:`memory`.
        """
        self._counters = dict(counters)
        self._set_tensors(list(averaged), [list(row) for row in memory])

    def extend(self, weights: Sequence[Tensor]) -> None:
        """Average more weights from now on: weights that did not move since the first update, such as frozen ones."""
        for row in self._memory:
            row += [self.copy_of(weight) for weight in weights]
        if self._averaged or not self._memory:
            self._averaged += [self.copy_of(weight) for weight in weights]
        self._prepared = None

    def state_dict(self) -> dict[str, Any]:
        """Return counters and tensors, which are live storage, as in :meth:`torch.nn.Module.state_dict`."""
        tensors = {"averaged": list(self.averaged), "memory": [list(row) for row in self.memory]}
        return {**super().state_dict(), **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a copy of what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        memory = [[tensor.clone() for tensor in row] for row in state["memory"]]
        self.load(state["counters"], [tensor.clone() for tensor in state["averaged"]], memory)

    def declared_state(self) -> dict[str, Any]:
        """Return the states that a subclass declares with ``add_state``, without counters and tensors."""
        return {name: value for name, value in super().state_dict().items() if name != "counters"}

    def load_declared_state(self, state: dict[str, Any]) -> None:
        """Load what :meth:`declared_state` returned; call it before :meth:`load`."""
        super().load_state_dict(state)

    def copy_of(self, weight: Tensor) -> Tensor:
        """Return a copy with the shape and placement of a weight, kept as :meth:`keep_in` says."""
        weight = weight.detach()
        (shard,) = shards.local_shards([weight])
        device = shard.device if self._device is None else self._device
        dtype = accumulation_dtype(weight.dtype, self._dtype)
        dtype = torch.promote_types(dtype, weight.dtype) if self.keep_wide else dtype
        return shards.placed_as(shard.to(device, dtype, copy=True), weight)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes of a copy, which does not hold the weights."""
        return {**self.__dict__, "_prepared": None}

    # ---- for subclasses ----------------------------------------------------------------------------------------------

    def _begin(self, weights: Sequence[Tensor], step: int) -> None:
        """Make the first update: copy the weights."""
        self._set_tensors([self.copy_of(weight) for weight in weights], [])
        self._counters = {"updates": 1, "first": step, "last": step}

    def _since(self, step: int) -> int:
        """Return the number of steps since the last update."""
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

    def _remember_(self, weights: Sequence[Tensor], rows: int) -> None:
        """Keep the weights in the memory, as the last of so many rows; :meth:`_compute_` makes the average of them."""
        while len(self._memory) > rows:  # resumed with a smaller number
            self._memory.pop(0)
        if len(self._memory) < rows:
            self._memory.append([self.copy_of(weight) for weight in weights])
        else:
            oldest = self._memory.pop(0)
            if oldest:
                torch._foreach_copy_(shards.local_shards(oldest), shards.local_shards(weights))
            self._memory.append(oldest)
        self._outdated = True

    def _compute_(self) -> None:
        """Compute the average of the memory; to be overridden where :meth:`_remember_` is used."""
        raise NotImplementedError(f"{type(self).__name__} has no `_compute_(self)`")

    def _pairs(self, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], bool]:
        """Return the local shards of averages and weights, and True if they agree in dtype and device."""
        if self._prepared is not None and self._prepared[0] is weights:
            return self._prepared[1:]
        ours, theirs = shards.local_shards(self._averaged), shards.local_shards(weights)
        alike = all(a.dtype == b.dtype and a.device == b.device for a, b in zip(ours, theirs, strict=True))
        if isinstance(weights, tuple) and not any(isinstance(weight, DTensor) for weight in weights):
            self._prepared = weights, ours, theirs, alike
        return ours, theirs, alike
