"""The averages of a model's buffers, and the values that validation and checkpoints see in their place."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.averaging.average import Average
from lightning_optim.averaging.training.averaged_tensors import Buffers, Source, copies_of, has_mean, keep
from lightning_optim.base import shards
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.runtime.lightning import rank_zero_info


class AveragedBuffers:
    """Buffers and their average, which no validation and no checkpoint changes.

    Until the next update these see the mean over ranks (:meth:`agree`) and statistics that were estimated anew
    (:meth:`estimate`) in place of the average itself. They are called its uses here.

    Args:
        sources: The buffers.
        average: The policy, of which this holds a copy.

    Attributes:
        sources: The buffers, as long as they can be averaged.
        average: Their average.
    """

    def __init__(self, sources: Iterable[Source], average: Average) -> None:
        self.sources = Buffers(sources)
        self.average = copy.deepcopy(average)
        self.average.keep_wide = True
        self.changed()

    def changed(self) -> None:
        """Forget means over ranks and estimates: the averages, or the weights that they belong to, have changed."""
        self._agreed: dict[tuple[int, str], Tensor] | None = None
        self._estimated: dict[tuple[int, str], Tensor] = {}

    def update_(self, step: int) -> None:
        """Take in the present values."""
        if (kept := self.sources.renew()) is not None:
            keep(self.sources, self.average, kept)
        if (ready := self.sources.ready()) and self.average.started:
            self.average.extend(ready)
        self.average.update_(self.sources.tensors, step=step)
        self.sources.stay_finite_(self.average)

    def _held(self) -> Iterator[tuple[Source, Tensor]]:
        """Yield each buffer and its average, after the first update."""
        return zip(self.sources if self.average.started else (), self.average.averaged, strict=True)

    def pairs(self) -> Iterator[tuple[Source, Tensor]]:
        """Yield each buffer that is in the model with the shape it had, and its average."""
        for source, mean in self._held():
            if source.names and has_mean(source.tensor) and source.tensor.shape == mean.shape:
                yield source, mean

    def used(self, place: tuple[int, str], average: Tensor) -> Tensor:
        """Return the tensor that uses see in place of the average of the tensor at this place in the model."""
        return self._estimated.get(place, (self._agreed or {}).get(place, average))

    def agree(self, group: dist.ProcessGroup) -> None:
        """Compute the mean over ranks of the averages, which each rank has from its own batches."""
        if self._agreed is not None or not self.average.started:
            return
        self._agreed = {}
        own = {source.place: mean for source, mean in self._held() if not isinstance(mean, DTensor)}
        if not own:
            return
        plain = [_as_real(tensor) for tensor in own.values()]
        wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in plain) else torch.float32
        flat = torch.cat([tensor.reshape(-1).to(wide) for tensor in plain])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        means = torch.split(flat, [tensor.numel() for tensor in plain])
        for (place, tensor), mean in zip(own.items(), means, strict=True):
            agreed = self._agreed[place] = torch.empty_like(tensor)
            _as_real(agreed).copy_(mean.view_as(_as_real(tensor)))

    def estimate(self, place: tuple[int, str], average: Tensor, value: Tensor) -> Tensor:
        """Let uses see a value in place of an average; return it in the average's dtype and placement."""
        estimate = self._estimated[place] = torch.empty_like(average)
        shards.copy_(estimate, value)
        return estimate

    # ---- in a checkpoint ---------------------------------------------------------------------------------------------

    def own(self) -> dict[str, Tensor]:
        """Return the averages, by name, where uses see an estimate."""
        return {source.name: mean for source, mean in self._held() if source.names and source.place in self._estimated}

    def of_rank(self) -> dict[str, Tensor]:
        """Return this rank's averages where uses see a mean over ranks or an estimate, by their paths in the state."""
        agreed = self._agreed or {}
        parts = {"averaged": self.average.averaged}
        parts |= {f"memory/0/{place}": remembered for place, remembered in enumerate(self.average.memory)}
        found = {
            f"{path}/{source.name}": tensor
            for path, held in parts.items()
            for source, tensor in zip(self.sources if self.average.started else (), held, strict=True)
            if source.names and source.place in agreed and not (path == "averaged" and source.place in self._estimated)
        }
        return found | {f"own/{name}": tensor for name, tensor in self.own().items()}

    def load_estimates(self, names: Collection[str], used: dict[str, Tensor]) -> None:
        """Let uses see an estimate of the buffers with these plain names: from ``used``, else from the model."""
        self.changed()
        estimated = [source for source in self.sources if not set(names).isdisjoint(map(plain_name, source.names))]
        values = copies_of(estimated, self.average, used)
        self._estimated = {source.place: value for source, value in zip(estimated, values, strict=True)}

    def leave_out(self, recorded: set[str]) -> None:
        """Use the latest of the buffers of which a state holds no average: they came later, or changed their shape."""
        left = [s for s in self.sources if s.names and not recorded.intersection(map(plain_name, s.names))]
        if left:
            names = [plain_name(source.name) for source in left]
            rank_zero_info(f"The checkpoint holds no average of these buffers, which stay the latest: {names}")
            kept = [position for position, source in enumerate(self.sources) if source not in left]
            keep(self.sources, self.average, kept)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
