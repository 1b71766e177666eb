"""Average the buffers of a model; compute the values that validations and checkpoints use for them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_optim.averaging.averages.average import Average
from lightning_optim.averaging.training.averaged_tensors import Source, Sources, copies_of, keep
from lightning_optim.base import foreach, module_tensors, shards
from lightning_optim.base.dtypes import has_mean
from lightning_optim.base.layer_classes import RunningNormBase
from lightning_optim.base.module_registry import buffer_of
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.runtime.lightning import rank_zero_info


class BufferSources(Sources):
    """Hold the buffers that are averaged, each as long as it keeps the shape and dtype of its first update.

    Lazy buffers are added when they have a shape (:meth:`take_ready`).
    """

    def __init__(self, sources: Iterable[Source] = ()) -> None:
        listed = list(sources)
        self._lazy = [source for source in listed if is_lazy(source.tensor)]
        super().__init__(source for source in listed if source not in self._lazy)

    def _prepare(self) -> None:
        self._places = [(source.owner, source.key) for source in self._sources]
        self._seen = [source.tensor for source in self._sources]
        # Running statistics are finite as long as the weights are.
        self._may_be_infinite = [
            i for i, (owner, _) in enumerate(self._places) if not isinstance(owner, RunningNormBase)
        ]
        self._shapes = [tensor.shape for tensor in self._seen]
        super()._prepare()

    def renew(self) -> list[int] | None:
        """Look the tensors up again; if some can no longer be averaged, return the positions of the rest."""
        same = True
        for (owner, key), seen, shape in zip(self._places, self._seen, self._shapes):  # noqa: B905 (on the hot path)
            same = same and owner is not None and buffer_of(owner, key) is seen and seen.shape == shape
        if same:
            return None
        kept = [i for i, source in enumerate(self._sources) if self._still_fits(i, source.live)]
        if len(kept) == len(self._sources):
            self._prepare()
            return None
        return kept

    def take_ready(self) -> list[Tensor]:
        """Add the lazy buffers that got their shape since the last call, and return them."""
        found = [source for source in self._lazy if source.live is not None and not is_lazy(source.live)]
        if found:
            self._lazy = [source for source in self._lazy if source not in found]
            self.extend(found)
        return [source.tensor for source in found]

    def stay_finite_(self, average: Average) -> None:
        """Replace elements of averages that are not finite by the latest ones, without a host synchronisation.

        A mask with infinities has no mean, nor has a running extreme that starts at infinity, since ∞ - ∞ is NaN.
        """
        if positions := self._may_be_infinite:
            averaged = average.averaged
            _stay_finite_([averaged[i] for i in positions], [self._tensors[i] for i in positions])

    def _still_fits(self, position: int, live: Tensor | None) -> bool:
        if live is None or not can_be_averaged(live) or live.dtype != self._seen[position].dtype:
            return False
        return self._shapes[position] == live.shape


class AveragedBuffers:
    """Average the buffers of a model, and hold the values in use: those of validations and checkpoints.

    The value in use is an estimate (:meth:`set_estimate`), else the mean over ranks (:meth:`reduce_over_ranks`), else
    the average itself. Both are dropped at the next update; no use changes the average.

    Args:
        sources: The buffers.
        average: The policy. This object has a copy of it.

    Attributes:
        sources: The buffers that can still be averaged.
        average: Their average.
    """

    def __init__(self, sources: Iterable[Source], average: Average) -> None:
        self.sources = BufferSources(sources)
        self.average = copy.deepcopy(average)
        self.average.keep_wide = True
        self.changed()

    def changed(self) -> None:
        """Drop means over ranks and estimates, since the averages, or the weights they belong to, have changed."""
        self._over_ranks: dict[tuple[int, str], Tensor] | None = None
        self._estimated: dict[tuple[int, str], Tensor] = {}

    def update_(self, step: int) -> None:
        """Update the average with the present values."""
        if (kept := self.sources.renew()) is not None:
            keep(self.sources, self.average, kept)
        if (ready := self.sources.take_ready()) and self.average.started:
            self.average.extend(ready)
        self.average.update_(self.sources.tensors, step=step)
        self.sources.stay_finite_(self.average)

    def _averaged(self) -> Iterator[tuple[Source, Tensor]]:
        """Yield each buffer and its average; nothing before the first update."""
        return zip(self.sources if self.average.started else (), self.average.averaged, strict=True)

    def pairs(self) -> Iterator[tuple[Source, Tensor]]:
        """Yield each buffer that the model still has in the same shape, and its average."""
        for source, mean in self._averaged():
            if source.names and can_be_averaged(source.tensor) and source.tensor.shape == mean.shape:
                yield source, mean

    def used(self, place: tuple[int, str], average: Tensor) -> Tensor:
        """Return the value in use for the tensor at this place in the model; by default its average."""
        return self._estimated.get(place, (self._over_ranks or {}).get(place, average))

    def reduce_over_ranks(self, group: dist.ProcessGroup) -> None:
        """Compute the mean of the averages over ranks, since each rank averages the buffers of its own batches.

        The averages themselves go on unchanged, so that no validation or checkpoint changes the run.
        """
        if self._over_ranks is not None or not self.average.started:
            return
        self._over_ranks = {}
        own = {source.place: mean for source, mean in self._averaged() if not isinstance(mean, DTensor)}
        if not own:
            return
        plain = [_as_real(tensor) for tensor in own.values()]
        wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in plain) else torch.float32
        flat = torch.cat([tensor.reshape(-1).to(wide) for tensor in plain])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        means = torch.split(flat, [tensor.numel() for tensor in plain])
        for (place, tensor), mean in zip(own.items(), means, strict=True):
            reduced = self._over_ranks[place] = torch.empty_like(tensor)
            _as_real(reduced).copy_(mean.view_as(_as_real(tensor)))

    def set_estimate(self, place: tuple[int, str], average: Tensor, value: Tensor) -> Tensor:
        """Use a value instead of an average; return it in the average's dtype and placement."""
        estimate = self._estimated[place] = torch.empty_like(average)
        shards.copy_(estimate, value)
        return estimate

    # ---- in a checkpoint ---------------------------------------------------------------------------------------------

    def own(self) -> dict[str, Tensor]:
        """Return the averages, by name, of the buffers for which an estimate is in use."""
        return {
            source.name: mean for source, mean in self._averaged() if source.names and source.place in self._estimated
        }

    def of_rank(self) -> dict[str, Tensor]:
        """Return this rank's averages where another value is in use, by their paths in the state."""
        reduced = self._over_ranks or {}
        parts = {"averaged": self.average.averaged}
        parts |= {f"memory/0/{place}": remembered for place, remembered in enumerate(self.average.memory)}
        found = {
            f"{path}/{source.name}": tensor
            for path, held in parts.items()
            for source, tensor in zip(self.sources if self.average.started else (), held, strict=True)
            if source.names and source.place in reduced and not (path == "averaged" and source.place in self._estimated)
        }
        return found | {f"own/{name}": tensor for name, tensor in self.own().items()}

    def load_estimates(self, names: Collection[str], used: dict[str, Tensor]) -> None:
        """Load estimates of the buffers with these plain names: from ``used``, else from the model."""
        self.changed()
        estimated = [source for source in self.sources if not set(names).isdisjoint(map(plain_name, source.names))]
        values = copies_of(estimated, self.average, used)
        self._estimated = {source.place: value for source, value in zip(estimated, values, strict=True)}

    def leave_out(self, recorded: set[str]) -> None:
        """Stop averaging buffers without an average in the state: they came later, or changed their shape."""
        left = [s for s in self.sources if s.names and not recorded.intersection(map(plain_name, s.names))]
        if left:
            names = [plain_name(source.name) for source in left]
            rank_zero_info(f"The checkpoint holds no average of these buffers, which stay the latest: {names}")
            kept = [position for position, source in enumerate(self.sources) if source not in left]
            keep(self.sources, self.average, kept)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def can_be_averaged(buffer: Tensor) -> bool:
    """Return True if a buffer of this kind can be averaged; no value is read.

    Integers, bools and 8-bit floats, which are codes, have no mean. The elements of an expanded tensor share memory, to
    which torch refuses to write, and a sparse tensor may have other elements at each step.
    """
    return has_mean(buffer) and buffer.dtype.itemsize > 1 and (is_lazy(buffer) or module_tensors.is_writable(buffer))


@torch.no_grad()
def _stay_finite_(averaged: list[Tensor], latest: list[Tensor]) -> None:
    by_kind: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for mean, value in zip(shards.local_shards(averaged), shards.local_shards(latest), strict=True):
        means, values = by_kind.setdefault((mean.dtype, mean.device), ([], []))
        means.append(mean)
        values.append(value)
    for means, values in by_kind.values():
        for some, others in foreach.chunks(means, values):
            flat = torch.cat([mean.reshape(-1) for mean in some])
            now = torch.cat([value.reshape(-1) for value in others]).to(flat)
            finite = torch.split(torch.where(flat.isfinite(), flat, now), [mean.numel() for mean in some])
            torch._foreach_copy_(some, [part.view_as(mean) for part, mean in zip(finite, some, strict=True)])
