"""Hold the averages of one model's weights: update them, and exchange them with the model's weights."""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_optim.averaging.averages.average import Average
from lightning_optim.averaging.training.averaged_buffers import AveragedBuffers
from lightning_optim.averaging.training.averaged_tensors import (
    Source,
    Sources,
    keep,
    names_in,
    trainable,
)
from lightning_optim.averaging.training.buffer_plan import BufferPlan
from lightning_optim.averaging.training.pruned_parameters import Pruning
from lightning_optim.averaging.training.spectral_norm_vectors import SpectralEstimates
from lightning_optim.base import foreach, shards
from lightning_optim.base.layer_classes import BatchNormBase
from lightning_optim.base.module_registry import buffer_of
from lightning_optim.runtime.interrupts import uninterrupted
from lightning_optim.runtime.lightning.torch_internals import keep_versions
from lightning_optim.runtime.object_state import same_objects

_average_in: WeakKeyDictionary[nn.Module, AveragedWeights] = WeakKeyDictionary()
"""The average that a module holds now, of any callback. It goes out before another one comes in."""


@dataclass(eq=False)
class _Exchange:
    """Record that a tensor of the model holds its average now.

    Attributes:
        source: The tensor.
        average: Storage of its average, which has the raw values unless ``raw`` has them.
        raw: A copy of the raw values, where the two cannot be swapped.
    """

    source: Source
    average: Tensor
    raw: Tensor | None = None


class AveragedWeights:
    """Average a model's parameters, those of each optimizer by itself, and its buffers with the first optimizer.

    To use the average it is exchanged with the model's tensors: the raw weights are then in the storage of the average,
    or in a copy if dtype or device differ. Raw buffers are always in a copy. This object records what it has exchanged,
    also when the module has a new average or is gone; :func:`average_in` tells which average a module holds.

    Args:
        module: The model.
        optimizers: The optimizers that step its parameters.
        average: The policy. Each optimizer gets a copy of it.
        plan: The modes of the model's buffers.

    Attributes:
        sources: The averaged parameters of each optimizer. A parameter that is frozen later stays averaged: its value
            stands still, and the average moves towards it.
        buffers: The averaged buffers.
        fresh: True if the BatchNorm statistics in the average belong to its present weights.
        averages: The policy of each optimizer.
        optimizers: Weak references to the optimizers.
        estimates: The vectors of spectral normalization for the averaged weights.
    """

    def __init__(self, module: nn.Module, optimizers: list[Optimizer], average: Average, plan: BufferPlan) -> None:
        self._module = weakref.ref(module)  # so that a callback that outlives the fit does not keep the module alive
        self.optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self.averages = [copy.deepcopy(average) for _ in optimizers]
        self.sources = [Sources() for _ in optimizers]
        self._trainable: list[list[nn.Parameter]] = [[] for _ in optimizers]
        self._lazy: list[nn.Parameter] = []
        self.buffers = AveragedBuffers(plan.averaged if optimizers else (), average)
        self.estimates = SpectralEstimates(plan.vectors)
        self.fresh = False
        self._pruning = Pruning()
        self._exchanged: dict[tuple[int, str], _Exchange] = {}  # by place; empty while the average is not in the model
        self._left: list[tuple[Tensor, int]] | None = None  # versions of the parameters in which the average was left
        _average_in.pop(module, None)  # an average that an earlier fit has left there is this fit's raw weights
        for index, optimizer in enumerate(optimizers):
            self.follow(index, optimizer)

    @property
    def module(self) -> nn.Module | None:
        """The model, if it is still alive."""
        return self._module()

    @property
    def started(self) -> bool:
        """True if there was an update."""
        return any(average.started for average in self.averages)

    def alive(self) -> nn.Module:
        """Return the model, which must still be alive."""
        module = self.module
        assert module is not None, "the caller holds the module whose weights it moves"
        return module

    @property
    def updates(self) -> int:
        """Number of updates, of several optimizers the largest."""
        return max((average.counters.get("updates", 0) for average in self.averages), default=0)

    # ---- parameters and updates --------------------------------------------------------------------------------------

    def follow(self, index: int, optimizer: Optimizer) -> None:
        """Add parameters that became trainable, and drop those that left the model. Call it before each step.

        Args:
            index: Index of the optimizer.
            optimizer: The optimizer, which may have replaced another one.
        """
        self.optimizers[index] = weakref.ref(optimizer)
        now = trainable(optimizer)
        if same_objects(now, self._trainable[index]) and all(map(is_lazy, self._lazy)):
            return
        self._trainable[index] = now
        self._lazy = [parameter for parameter in self.alive().parameters() if is_lazy(parameter)]
        names = names_in(self.alive())
        for sources, average in zip(self.sources, self.averages, strict=True):
            kept = [place for place, source in enumerate(sources) if id(source.parameter) in names]
            if len(kept) < len(sources):
                keep(sources, average, kept)
        for place, reference in enumerate(self.optimizers):
            if (stepped := reference()) is not None:
                self.add(place, trainable(stepped), names)

    def add(self, index: int, parameters: Sequence[nn.Parameter], names: dict[int, tuple[str, ...]]) -> None:
        """Average these parameters of the model with an optimizer from now on, unless they are averaged already."""
        known = {id(source.parameter) for sources in self.sources for source in sources}
        new = {id(p): p for p in parameters if id(p) in names and id(p) not in known and not is_lazy(p)}.values()
        if new:
            self.sources[index].extend([Source(p, names=names[id(p)]) for p in new])
            if self.averages[index].started:
                self.averages[index].extend(list(new))

    def update_(self, index: int, step: int) -> None:
        """Update the average of one optimizer's weights, and with the first optimizer that of the buffers.

        Args:
            index: Index of the optimizer.
            step: Number of its steps so far. If there was none since the last update, nothing happens.
        """
        if self._pruning.changed:
            self.follow_pruning()
        average = self.averages[index]
        before = average.counters
        average.update_(self.sources[index].tensors, step=step)
        if average.counters == before:
            return
        if index == 0:
            self.buffers.update_(step)
        self.buffers.changed()
        self.estimates.restart_()
        self.fresh = False

    @torch.no_grad()
    def follow_pruning(self) -> None:
        """Mask the averages of weights whose pruning was made permanent since the last call.

        Making pruning permanent multiplied the weights in the model by their masks, but not the tensors here.
        """
        if (module := self.module) is None:
            return
        masks = self._pruning.ended(module)
        for sources, average in zip(self.sources, self.averages, strict=True):
            if not masks or not average.started:
                continue
            for position, source in enumerate(sources):
                if (mask := masks.get(id(source.parameter))) is not None:
                    exchange = self._exchanged.get(source.place)
                    copied = None if exchange is None else exchange.raw
                    for tensor in (average.averaged[position], *(row[position] for row in average.memory), copied):
                        if tensor is not None:
                            tensor.mul_(mask.to(tensor))

    def look_up(self) -> None:
        """Look up the names of all tensors, which pruning and parametrizations change in the middle of a run."""
        if (module := self.module) is None:
            return
        self.follow_pruning()
        names = names_in(module)
        for source in itertools.chain(*self.sources, self.buffers.sources, self.estimates.sources()):
            source.look_up(names)

    def pairs(self) -> Iterator[tuple[Source, Tensor]]:
        """Yield each tensor that is still in the model, and its average; nothing before the first update."""
        self.look_up()
        for sources, average in zip(self.sources, self.averages, strict=True):
            if average.started:
                yield from ((s, mean) for s, mean in zip(sources, average.averaged, strict=True) if s.names)
        yield from self.buffers.pairs()
        if self.started:
            # A weight that was never averaged keeps its own vectors.
            yield from self.estimates.pairs({id(source.parameter) for source in itertools.chain(*self.sources)})

    def named(self) -> dict[str, Tensor]:
        """Return the averaged tensors under all their names, in or out of the model; empty before the first update."""
        return {name: average for source, _, average in self.located() for name in source.names}

    def located(self) -> Iterator[tuple[Source, Tensor, Tensor]]:
        """Yield each tensor with its raw value and its average, in or out of the model."""
        present = average_in(self.module)
        displaced = {} if present is None else present._displaced()
        for source, average in self.pairs():
            place, live = source.place, source.tensor
            exchange = self._exchanged.get(place)
            if exchange is not None and exchange.raw is None:
                average = live
            yield source, displaced.get(place, live), self.buffers.used(place, average)

    def _displaced(self) -> dict[tuple[int, str], Tensor]:
        """Return the raw tensors that this average has replaced in the model, by place."""
        return {
            place: exchange.average if exchange.raw is None else shards.placed_as(exchange.raw, exchange.average)
            for place, exchange in self._exchanged.items()
        }

    def raw(self) -> dict[str, Tensor]:
        """Return the raw values of the averaged tensors, under all their names."""
        return {name: raw for source, raw, _ in self.located() for name in source.names}

    def reduce_buffers(self, group: dist.ProcessGroup) -> None:
        """Compute the mean over ranks of the averaged buffers, for uses of the present average."""
        if not self.in_model:
            self.buffers.reduce_over_ranks(group)

    def of_rank(self) -> dict[str, Tensor]:
        """Return this rank's averaged buffers that differ from those in use, by their paths in the state."""
        self.look_up()
        return self.buffers.of_rank()

    # ---- in and out of the model -------------------------------------------------------------------------------------

    @property
    def in_model(self) -> bool:
        """True if the model holds the average now."""
        return bool(self._exchanged)

    @property
    def left_in_model(self) -> bool:
        """True if the average was put into the model to stay, at the end of the fit."""
        return self._left is not None

    @property
    def lost(self) -> bool:
        """True if the parameters were written to after the average was left in the model."""
        return self.in_model and any(shards.version(tensor) != version for tensor, version in self._left or ())

    def leave_in_model_(self) -> None:
        """Put the average into the model to stay, and note the versions of the parameters (:attr:`lost`)."""
        if not self.in_model:
            self.exchange_()
        held = (exchange.source.tensor for exchange in self._exchanged.values() if exchange.source.owner is None)
        self._left = [(tensor, shards.version(tensor)) for tensor in held]

    @torch.no_grad()
    def exchange_(self) -> None:
        """Exchange the average and the model's tensors: all of them, or none of them if an error is raised."""
        with uninterrupted():
            module, leaving = self.alive(), self.in_model
            shards.reshard_(module)
            self.follow_pruning()
            pairs = () if leaving else self.pairs()
            moving = list(self._exchanged.values()) if leaving else [_Exchange(*pair) for pair in pairs]
            done = []
            try:
                for exchange in moving:
                    self._swap_(exchange, leaving)
                    done.append(exchange)
                if not leaving and not self.estimates.done:
                    self.estimates.estimate_({exchange.source.place for exchange in moving})
            except BaseException:
                for exchange in done:
                    self._swap_(exchange, not leaving)
                raise
            self._exchanged = {} if leaving else {exchange.source.place: exchange for exchange in moving}
            self._pruning.exchange_products(module, self.in_model)
            if self.in_model:
                _average_in[module] = self
            else:
                _average_in.pop(module, None)

    def estimate_(self) -> None:
        """Estimate the vectors of spectral normalization for the averaged weights, once after each update."""
        if self.started and not self.estimates.done and not self.in_model:
            with raw_weights_in(self.alive()), self.exchanged():
                pass

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Context manager: average and model are exchanged; afterwards, also after an error, they are as before."""
        before = self.in_model
        # A graph that was built before may go backward afterwards, when the weights have their values again.
        with keep_versions(source.tensor for source, _ in self.pairs()):
            try:
                self.exchange_()
                yield
            finally:
                if self.in_model is not before:
                    self.exchange_()

    def _swap_(self, exchange: _Exchange, leaving: bool) -> None:
        """Put one average into the model or, if ``leaving``, the raw tensor."""
        source, average = exchange.source, exchange.average
        live = source.live
        if live is None or live.shape != average.shape:  # the model has changed while the average was in it
            return
        used = self.buffers.used(source.place, average)
        (ours,), (theirs,) = shards.local_shards([used]), shards.local_shards([live])
        if exchange.raw is not None:
            theirs.copy_(exchange.raw if leaving else ours)
        elif source.owner is None and ours.dtype == theirs.dtype and ours.device == theirs.device:
            foreach.swap_(ours, theirs)
        elif leaving:  # the module was moved to another device meanwhile
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)
        else:
            # Buffers are copied and never exchanged, so that what a validation writes to one stays out of the average.
            exchange.raw = theirs.clone()
            theirs.copy_(ours)

    @torch.no_grad()
    def set_statistics_(self, layer: BatchNormBase, mean: Tensor, variance: Tensor) -> None:
        """Set estimated statistics in a layer of the model, which holds the average, and for later uses of it."""
        for key, value in (("running_mean", mean), ("running_var", variance)):
            live = buffer_of(layer, key)
            assert live is not None
            if (exchange := self._exchanged.get((id(layer), key))) is not None:
                shards.copy_(live, self.buffers.set_estimate(exchange.source.place, exchange.average, value))


def average_in(module: nn.Module | None) -> AveragedWeights | None:
    """Return the average that ``module`` holds now, of any callback."""
    return None if module is None else _average_in.get(module)


@contextlib.contextmanager
def raw_weights_in(module: nn.Module) -> Iterator[None]:
    """Context manager: ``module`` holds its raw weights; afterwards it holds the average again that it held before."""
    average = average_in(module)
    with contextlib.nullcontext() if average is None or average.lost else average.exchanged():
        yield
