"""The averages of one model's weights: beside the model, in it, and in a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import tensors
from lightning_optim.averaging.averages import Average
from lightning_optim.averaging.sources import Source, plain_name, sources_of

_inside: WeakKeyDictionary[nn.Module, list[Shadow]] = WeakKeyDictionary()
"""Whose averages lie in a module, each over those before it."""


class Shadow:
    """One average for each optimizer's weights; the first one's also holds the model's floating-point buffers.

    Args:
        module: The model, with its optimizers' parameters; under FSDP2 resharded.
        optimizers: Those that step.
        average: The policy, of which each optimizer gets a copy.
        buffers: Whether buffers are averaged too.

    Attributes:
        inside: Whether the model holds the average now. The raw weights lie in the average's storage meanwhile, or
            beside where dtype or device differ.
        fresh: Whether the BatchNorm statistics in the average were estimated for its present weights.
    """

    def __init__(self, module: nn.Module, optimizers: list[Optimizer], average: Average, buffers: bool) -> None:
        self._module = weakref.ref(module)  # a callback that is kept keeps no module alive
        self.sources = sources_of(module, optimizers, buffers)
        self.averages = [copy.deepcopy(average) for _ in optimizers]
        self.inside = self.fresh = self._reduced = False
        self._raw: dict[str, Tensor] = {}
        _inside[module] = []

    @property
    def module(self) -> nn.Module | None:
        """The model, if it is still alive."""
        return self._module()

    @property
    def started(self) -> bool:
        """Whether there is an average that could be used."""
        return any(average.started for average in self.averages)

    def _alive(self) -> nn.Module:
        module = self.module
        assert module is not None, "whoever moves weights holds the module"
        return module

    @property
    def updates(self) -> int:
        """The number of updates of the average that had most."""
        return max((average.counters.get("updates", 0) for average in self.averages), default=0)

    def update_(self, index: int, step: int) -> None:
        """Take in the present weights of one optimizer."""
        self.averages[index].update_(self.sources[index].tensors, step=step)
        self.fresh = self._reduced = False

    def extend(self, optimizers: list[Optimizer]) -> None:
        """Average what became trainable; call it before these weights move."""
        module = self._alive()
        tensors.reshard_(module)
        for ours, now, average in zip(
            self.sources, sources_of(module, optimizers, buffers=False), self.averages, strict=True
        ):
            new = ours.missing(now)
            ours.extend(new)
            if average.started:
                average.extend([source.tensor for source in new])

    def pairs(self) -> Iterator[tuple[Source, Tensor]]:
        """What is averaged, and its average, of the optimizers whose average has started."""
        for sources, average in zip(self.sources, self.averages, strict=True):
            if average.started:
                yield from zip(sources, average.averaged, strict=True)

    def named(self) -> dict[str, Tensor]:
        """The averaged tensors under all their names, wherever they lie now; empty before the first update."""
        return {name: average for source, _, average in self.located() for name in source.names}

    def located(self) -> Iterator[tuple[Source, Tensor, Tensor]]:
        """What is averaged, its raw tensor and its average, wherever these lie while averages are in the model."""
        stack = self._stack
        displaced = [shadow._displaced() for shadow in stack]
        above = displaced[stack.index(self) + 1 :] if self in stack else []
        for source, average in self.pairs():
            name, live = source.name, source.tensor
            raw = next((lain[name] for lain in displaced if name in lain), live)
            if self.inside and name not in self._raw:
                average = next((lain[name] for lain in above if name in lain), live)
            yield source, raw, average

    @property
    def _stack(self) -> list[Shadow]:
        module = self.module
        return [] if module is None else _inside[module]

    @property
    def uppermost(self) -> bool:
        """Whether what the model holds now is this average."""
        return self.inside and self._stack[-1:] in ([self], [])

    def _displaced(self) -> dict[str, Tensor]:
        """What this average has displaced from the model, which it is in: kept beside, else in its own storage."""
        own = {source.name: average for source, average in self.pairs()}
        kept = {s.name: tensors.placed_as(self._raw[s.name], s.tensor) for s, _ in self.pairs() if s.name in self._raw}
        return own | kept

    def reduce_(self, group: dist.ProcessGroup) -> None:
        """Let all ranks have the mean of their averaged buffers, which each has from its own batches.

        An average is linear, so that the mean goes on as the mean of what the ranks would have had.
        """
        if self._reduced or self.inside or not self.sources or not self.averages[0].started:
            return
        self._reduced = True
        first = self.averages[0]
        kept = [*first.memory, first.averaged]
        buffers = [w for held in kept for s, w in zip(self.sources[0], held, strict=True) if s.owner is not None]
        plain = [tensor for tensor in buffers if not isinstance(tensor, tensors.DTensor)]
        if not plain:
            return
        wide = torch.float64 if any(_as_real(tensor).dtype == torch.float64 for tensor in plain) else torch.float32
        flat = torch.cat([_as_real(tensor).reshape(-1).to(wide) for tensor in plain])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        sizes = [_as_real(tensor).numel() for tensor in plain]
        for tensor, mean in zip(plain, torch.split(flat, sizes), strict=True):
            _as_real(tensor).copy_(mean.view_as(_as_real(tensor)))

    # ---- in and out of the model -------------------------------------------------------------------------------------

    @torch.no_grad()
    def exchange_(self) -> None:
        """Let average and raw weights change places: all of them, or none if something fails."""
        with uninterrupted():
            tensors.reshard_(self._alive())
            done = []
            try:
                for source, average in self.pairs():
                    self._swap_(source, average)
                    done.append((source, average))
            except BaseException:
                for source, average in done:
                    self._swap_(source, average)
                raise
            self.inside = not self.inside
            if self.inside:
                self._stack.append(self)
            else:
                self._stack.remove(self)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Within this the model holds the average, and afterwards the raw weights again, whatever happened."""
        with contextlib.ExitStack() as versions:
            for source, _ in self.pairs():
                # What was computed before may go backward afterwards: by then the weights are what they were.
                versions.enter_context(torch.autograd._unsafe_preserve_version_counter(source.tensor))
            try:
                self.exchange_()
                yield
            finally:
                if self.inside:
                    self.exchange_()

    def _swap_(self, source: Source, average: Tensor) -> None:
        (ours,), (theirs,) = tensors.local([average]), tensors.local([source.tensor])
        if ours.dtype == theirs.dtype and ours.device == theirs.device:
            tensors.exchange_(ours, theirs)
        elif source.name in self._raw:
            theirs.copy_(self._raw.pop(source.name))
        else:
            self._raw[source.name] = theirs.clone()
            theirs.copy_(ours)

    @torch.no_grad()
    def keep_buffers(self) -> None:
        """While the average is in the model: what changed in the model's buffers belongs to the average."""
        for source, average in self.pairs():
            if source.name in self._raw and source.owner is not None:
                average.copy_(source.tensor)
        self.fresh = True

    @contextlib.contextmanager
    def copied_into(self, module: nn.Module) -> Iterator[None]:
        """Within this, another module with the same names, compiled or not, holds the averaged weights."""
        averaged = {plain_name(name): average for name, average in self.named().items()}
        named = {plain_name(name): tensor for name, tensor in module.state_dict().items()}
        live = {name: tensor for name, tensor in named.items() if name in averaged}
        if missing := sorted(averaged.keys() - live.keys()):
            raise ValueError(f"{type(module).__name__} has no {missing[:3]}, of which there are averages")
        raw = {name: tensor.clone() for name, tensor in live.items()}
        try:
            for name, tensor in live.items():
                tensors.copy_(tensor, averaged[name])
            yield
        finally:
            for name, tensor in live.items():
                tensors.copy_(tensor, raw[name])

    # ---- in a checkpoint ---------------------------------------------------------------------------------------------

    def state(self, evaluated: bool) -> dict[str, Any]:
        """What a checkpoint needs beside the module's ``state_dict``.

        Args:
            evaluated: Whether ``state_dict`` holds the average. Then the raw weights are here, and of the average only
                what lost bits in the module's dtype; else the average.
        """
        raw, averaged = {}, {}
        for source, own, average in self.located():
            if evaluated:
                raw[source.name] = own
            if not evaluated or average.dtype != own.dtype:
                averaged[source.name] = average
        memory = {
            str(index): {
                str(place): {source.name: weight for source, weight in zip(sources, remembered, strict=True)}
                for place, remembered in enumerate(average.memory)
            }
            for index, (sources, average) in enumerate(zip(self.sources, self.averages, strict=True))
            if average.memory
        }
        counters = [average.counters for average in self.averages]
        return {"counters": counters, "raw": raw, "averaged": averaged, "memory": memory, "fresh": self.fresh}

    def raw(self) -> dict[str, Tensor]:
        """The raw tensors of what is averaged, under all their names."""
        return {name: raw for source, raw, _ in self.located() for name in source.names}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take over the average from a state, else from the model, which has the file's; then raw weights go in."""
        averaged = {plain_name(name): value for name, value in state["averaged"].items()}
        for index, counters in enumerate(state["counters"][: len(self.averages)]):
            if not counters:
                continue
            remembered = state.get("memory", {}).get(str(index), {})
            memory = [self._copies(index, remembered[str(place)]) for place in range(len(remembered))]
            self.averages[index].load(counters, self._copies(index, averaged), memory)
        self.fresh = state.get("fresh", False)
        raw = {plain_name(name): value for name, value in state["raw"].items()}
        for sources in self.sources:
            for source in sources:
                if (value := raw.pop(plain_name(source.name), None)) is not None:
                    tensors.copy_(source.tensor, value)
        for name, tensor in self._alive().state_dict().items() if raw else ():
            if plain_name(name) in raw and isinstance(tensor, Tensor):
                tensors.copy_(tensor, raw[plain_name(name)])

    def _copies(self, index: int, saved: dict[str, Tensor]) -> list[Tensor]:
        """What a state holds of one optimizer's weights, and the model's for the rest."""
        saved = {plain_name(name): value for name, value in saved.items()}
        copies = [self.averages[index].copy_of(source.tensor) for source in self.sources[index]]
        for source, own in zip(self.sources[index], copies, strict=True):
            if plain_name(source.name) in saved:
                tensors.copy_(own, saved[plain_name(source.name)])
        return copies


@contextlib.contextmanager
def raw_in(module: nn.Module) -> Iterator[None]:
    """Context manager: ``module`` holds its raw weights, whatever averages lie in it; afterwards these again."""
    with contextlib.ExitStack() as back:
        for shadow in reversed(list(_inside.get(module, []))):
            shadow.exchange_()
            back.callback(shadow.exchange_)
        yield


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within this an interrupt waits: half of the weights in place would be no weights at all."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
