"""Find the averaged tensors of a model again after it renamed, replaced or rebound them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.averaging.averages.average import Average
from lightning_optim.base import module_tensors, shards
from lightning_optim.base.module_registry import buffer_of

Names = dict[int, tuple[str, ...]]
"""From the ``id`` of each parameter and saved buffer to all its names, several for a tied one."""


@dataclass(eq=False)
class Source:
    """Find a tensor of the model that is averaged: a parameter, or the buffer of a submodule.

    A parameter is held as an object, since FSDP2 puts a gathered one in its place at times. A buffer is looked up,
    since modules bind a new tensor to its name.

    Attributes:
        parameter: The parameter; ``None`` for a buffer.
        owner: The submodule that has the buffer; ``None`` for a parameter.
        key: Name of the buffer in it.
        names: Names in the model's ``state_dict`` at the last :meth:`look_up`; several for a tied tensor, none for one
            that has left the model.
    """

    parameter: nn.Parameter | None = None
    owner: nn.Module | None = None
    key: str = ""
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """First name, which is the key in checkpoints."""
        return self.names[0]

    @property
    def live(self) -> Tensor | None:
        """The model's tensor; ``None`` for a buffer that is gone."""
        return self.parameter if self.owner is None else buffer_of(self.owner, self.key)

    @property
    def tensor(self) -> Tensor:
        """The model's tensor, which must still be there."""
        tensor = self.live
        assert tensor is not None
        return tensor

    @property
    def place(self) -> tuple[int, str]:
        """Identity of its place in the model, which a new name does not change."""
        return (id(self.parameter), "") if self.owner is None else (id(self.owner), self.key)

    def look_up(self, names: Names) -> None:
        """Look up the names."""
        self.names = names.get(id(self.live), ()) if self.live is not None else ()


class Sources:
    """Hold the tensors that are averaged together, in a fixed order."""

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
        """The model's tensors; the same tuple while they are the same tensors, so that a policy checks them once."""
        return self._tensors

    def extend(self, sources: list[Source]) -> None:
        """Add tensors at the end."""
        self._sources += sources
        self._prepare()

    def keep(self, positions: list[int]) -> None:
        """Keep the tensors at these positions, and drop the rest."""
        self._sources = [self._sources[position] for position in positions]
        self._prepare()


def names_in(module: nn.Module) -> Names:
    """Return the names of each parameter and saved buffer. Under FSDP2 this reshards the module."""
    shards.reshard_(module)
    found: Names = {}
    for name, tensor in module_tensors.named_tensors(module).items():
        found[id(tensor)] = (*found.get(id(tensor), ()), name)
    return found


def by_plain_name(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under their plain names."""
    return {module_tensors.plain_name(name): value for name, value in named.items()}


def all_of(optimizer: Optimizer | None) -> list[nn.Parameter]:
    """Return the parameters of an optimizer, frozen ones included; an empty list if the optimizer is gone."""
    return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


def trainable(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters that are trainable now, since fine-tuning callbacks add, freeze and unfreeze some."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def keep(sources: Sources, average: Average, positions: list[int]) -> None:
    """Keep the average of the tensors at these positions, and drop the rest."""
    if average.started:
        averaged, memory = average.averaged, average.memory
        kept = [[remembered[i] for i in positions] for remembered in memory]
        average.load(average.counters, [averaged[i] for i in positions], kept)
    sources.keep(positions)


def copies_of(sources: Iterable[Source], average: Average, saved: dict[str, Tensor]) -> list[Tensor]:
    """Return a copy of each tensor in ``saved``, and of the model's own where it is not there."""
    saved = by_plain_name(saved)
    copies = []
    for source in sources:
        own = average.copy_of(source.tensor)
        plain = map(module_tensors.plain_name, source.names)
        value = next((saved[name] for name in plain if name in saved), None)
        if value is not None and value.shape == own.shape:
            shards.copy_(own, value)
        copies.append(own)
    return copies
