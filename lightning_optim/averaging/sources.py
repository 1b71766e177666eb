"""Which tensors of a model are averaged, and how they are found again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import tensors


@dataclass(eq=False)
class Source:
    """A tensor of the model that is averaged: a parameter, or the present content of a module's buffer.

    Parameters are kept, since FSDP2 puts gathered ones in their place at times. Buffers are looked up, since modules
    bind them anew.

    Attributes:
        names: Its names in the model's ``state_dict``; several if it is tied.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter | None = None
    owner: nn.Module | None = None
    key: str = ""

    @property
    def name(self) -> str:
        """The first name, under which a checkpoint holds what belongs to it."""
        return self.names[0]

    @property
    def tensor(self) -> Tensor:
        """The live tensor."""
        tensor = self.parameter if self.owner is None else self.owner._buffers[self.key]
        assert tensor is not None
        return tensor


class Sources:
    """What is averaged with one optimizer, in an order that stays."""

    def __init__(self, sources: list[Source]) -> None:
        self._sources = sources
        self._tensors: tuple[Tensor, ...] = ()
        self._prepare()

    def __iter__(self) -> Iterator[Source]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def _prepare(self) -> None:
        self._buffers = [source for source in self._sources if source.owner is not None]
        self._tensors = tuple(source.tensor for source in self._sources)
        self._seen = [source.tensor for source in self._buffers]

    @property
    def buffers(self) -> list[Source]:
        """Those that are buffers."""
        return self._buffers

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The live tensors: the same tuple as long as the module holds the same ones, so that checks are made once."""
        if any(source.owner._buffers[source.key] is not seen for source, seen in zip(self._buffers, self._seen)):  # type: ignore[union-attr] # noqa: B905 (on the hot path)
            self._prepare()
        return self._tensors

    def missing(self, others: Sources) -> list[Source]:
        """The parameters of ``others`` that are not in here."""
        known = {id(source.parameter) for source in self._sources}
        return [source for source in others if source.parameter is not None and id(source.parameter) not in known]

    def extend(self, sources: list[Source]) -> None:
        """Add what became trainable."""
        self._sources += sources
        self._prepare()


def sources_of(module: nn.Module, optimizers: list[Optimizer], buffers: bool) -> list[Sources]:
    """What is averaged with each optimizer: its trainable parameters; with the first, floating-point buffers too.

    A parameter of several optimizers is averaged with the first of them. Frozen parameters stand still, so that their
    average is themselves; integers, bools, 8-bit floats, which are codes, and buffers with infinities, such as a mask,
    have no mean. All these are used as they are, the latest. So are buffers that no ``state_dict`` holds.

    Args:
        module: The model; under FSDP2 resharded.
        optimizers: Those that step.
        buffers: Whether buffers are averaged.
    """
    names = _names(module)
    sources: list[list[Source]] = []
    done: set[int] = set()
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        new = [p for p in parameters if id(p) in names and id(p) not in done]
        sources.append([Source(names[id(p)], parameter=p) for p in new])
        done.update(id(p) for p in new)
    for owner in module.modules() if sources and buffers else ():
        for key, buffer in owner._buffers.items():
            if buffer is not None and id(buffer) in names and id(buffer) not in done and _has_mean(buffer):
                done.add(id(buffer))  # a shared buffer once
                sources[0].append(Source(names[id(buffer)], owner=owner, key=key))
    return [Sources(found) for found in sources]


def _has_mean(buffer: Tensor) -> bool:
    # Elements of an expanded tensor share memory, and torch refuses to write to it.
    own = all(stride or size <= 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
    continuous = buffer.dtype.itemsize > 1 and (buffer.is_floating_point() or buffer.is_complex())
    return own and continuous and bool(tensors.local([buffer])[0].isfinite().all())


def _names(module: nn.Module) -> dict[int, tuple[str, ...]]:
    """The ``id`` of each parameter and saved buffer to its names in ``state_dict``, all of them if it is tied."""
    saved = module.state_dict(keep_vars=True)
    found: dict[int, tuple[str, ...]] = {}

    def add(name: str, tensor: Tensor) -> None:
        plain = plain_name(name)
        found[id(tensor)] = (*found.get(id(tensor), ()), name if name in saved or plain not in saved else plain)

    for name, parameter in module.named_parameters(remove_duplicate=False):
        add(name, parameter)
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                add(f"{prefix}.{key}" if prefix else key, buffer)
    return found


def plain_name(name: str) -> str:
    """The name without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "")


@torch.no_grad()
def trainable(optimizer: Optimizer) -> int:
    """How many parameters the optimizer has that are trainable now: fine-tuning callbacks add and unfreeze some."""
    return sum(p.requires_grad for group in optimizer.param_groups for p in group["params"])
