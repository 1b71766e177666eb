"""Which tensors of a model are averaged, and how they are found again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_optim.averaging.average import Average
from lightning_optim.base import foreach, module_tensors, shards
from lightning_optim.base.layer_classes import RunningNormBase
from lightning_optim.base.module_registry import buffer_of

Names = dict[int, tuple[str, ...]]
"""The ``id`` of each parameter and saved buffer to its names, all of them if it is tied."""


@dataclass(eq=False)
class Source:
    """A tensor of the model that is averaged: a parameter, or the present content of a module's buffer.

    Parameters are kept, since FSDP2 puts gathered ones in their place at times. Buffers are looked up, since modules
    bind them anew.

    Attributes:
        names: Its names in the model's ``state_dict`` when they were last looked up (:meth:`look_up`); several if it is
            tied, none if it has left the model. Pruning and parametrizations rename parameters in the middle of a run.
    """

    parameter: nn.Parameter | None = None
    owner: nn.Module | None = None
    key: str = ""
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The first name, under which a checkpoint holds what belongs to it."""
        return self.names[0]

    @property
    def live(self) -> Tensor | None:
        """The live tensor; ``None`` for a buffer that is gone."""
        return self.parameter if self.owner is None else buffer_of(self.owner, self.key)

    @property
    def tensor(self) -> Tensor:
        """The live tensor, of one that is still there."""
        tensor = self.live
        assert tensor is not None
        return tensor

    @property
    def place(self) -> tuple[int, str]:
        """Its place in the model, which stays when it is renamed."""
        return (id(self.parameter), "") if self.owner is None else (id(self.owner), self.key)

    def look_up(self, names: Names) -> None:
        """Renew the names."""
        self.names = names.get(id(self.live), ()) if self.live is not None else ()


class Sources:
    """Tensors that are averaged together, in an order that stays."""

    def __init__(self, sources: Iterable[Source] = ()) -> None:
        self._sources = list(sources)
        self._prepare()

    def __iter__(self) -> Iterator[Source]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def _prepare(self) -> None:
        self._tensors = tuple(source.tensor for source in self._sources)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The live tensors: the same tuple as long as the module holds the same ones, so that checks are made once."""
        return self._tensors

    def extend(self, sources: list[Source]) -> None:
        """Add what became trainable."""
        self._sources += sources
        self._prepare()

    def keep(self, positions: list[int]) -> None:
        """Keep the tensors at these positions, and forget the others."""
        self._sources = [self._sources[position] for position in positions]
        self._prepare()


class Buffers(Sources):
    """Buffers that are averaged: as long as each has the shape and the dtype that it had at the first update.

    Lazy buffers are added when they have got their shape (:meth:`ready`).
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
        """Look the tensors up again; return the positions of those that can still be averaged, if some cannot."""
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

    def ready(self) -> list[Tensor]:
        """Add the lazy buffers that have got their shape since this was called last, and return them."""
        found = [source for source in self._lazy if source.live is not None and not is_lazy(source.live)]
        if found:
            self._lazy = [source for source in self._lazy if source not in found]
            self.extend(found)
        return [source.tensor for source in found]

    def stay_finite_(self, average: Average) -> None:
        """Replace elements of averages that are not finite by the latest ones, without asking the device for a value.

        A mask with infinities has no mean, and neither has an extreme that starts at one: ∞ - ∞ is not a number.
        """
        if positions := self._may_be_infinite:
            averaged = average.averaged
            _stay_finite_([averaged[i] for i in positions], [self._tensors[i] for i in positions])

    def _still_fits(self, position: int, live: Tensor | None) -> bool:
        if live is None or not has_mean(live) or live.dtype != self._seen[position].dtype:
            return False
        return self._shapes[position] == live.shape


def has_mean(buffer: Tensor) -> bool:
    """Decide by the kind of tensor whether a buffer can be averaged; no value is read.

    Integers, bools and 8-bit floats, which are codes, have no mean. Elements of an expanded tensor share memory, and
    torch refuses to write to it; a sparse one may have other elements each time.
    """
    continuous = buffer.dtype.itemsize > 1 and (buffer.dtype.is_floating_point or buffer.dtype.is_complex)
    return continuous and (is_lazy(buffer) or module_tensors.is_writable(buffer))


def names_in(module: nn.Module) -> Names:
    """Return the names of each parameter and saved buffer; under FSDP2 the module is resharded for it."""
    shards.reshard_(module)
    found: Names = {}
    for name, tensor in module_tensors.named_tensors(module).items():
        found[id(tensor)] = (*found.get(id(tensor), ()), name)
    return found


def by_plain_name(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace each name by its plain one."""
    return {module_tensors.plain_name(name): value for name, value in named.items()}


def all_of(optimizer: Optimizer | None) -> list[nn.Parameter]:
    """Return the parameters of an optimizer, frozen or not; none if it is gone."""
    return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


def trainable(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters that are trainable now: fine-tuning callbacks add, freeze and unfreeze some."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def keep(sources: Sources, average: Average, positions: list[int]) -> None:
    """Go on with the average of some tensors, and forget that of the others."""
    if average.started:
        averaged, memory = average.averaged, average.memory
        kept = [[remembered[i] for i in positions] for remembered in memory]
        average.load(average.counters, [averaged[i] for i in positions], kept)
    sources.keep(positions)


def copies_of(sources: Iterable[Source], average: Average, saved: dict[str, Tensor]) -> list[Tensor]:
    """Return copies of the tensors that a state holds, and of the model's own where it holds none."""
    saved = by_plain_name(saved)
    copies = []
    for source in sources:
        own = average.copy_of(source.tensor)
        value = next(
            (
                saved[module_tensors.plain_name(name)]
                for name in source.names
                if module_tensors.plain_name(name) in saved
            ),
            None,
        )
        if value is not None and value.shape == own.shape:
            shards.copy_(own, value)
        copies.append(own)
    return copies


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
