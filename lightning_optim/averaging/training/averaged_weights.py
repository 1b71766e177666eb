"""Hold the averages of one model's weights: update them, and exchange them with the model's weights."""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Iterator, Sequence
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

_holding: WeakKeyDictionary[nn.Module, AveragedWeights] = WeakKeyDictionary()
"""Each module that holds an average now, and that average."""


class AveragedWeights:
    """Average a model's parameters, those of each optimizer by itself, and its buffers with the first optimizer.

    To use the average it is exchanged with the model's tensors: the raw weights then lie in the storage of the average,
    or in a copy where dtype or device differ. Raw buffers always lie in a copy.

    Args:
        module: The model.
        optimizers: The optimizers that step its parameters.
        average: The policy. Each optimizer gets a copy of it.
        plan: The modes of the model's buffers.

    Attributes:
        sources: The averaged parameters of each optimizer. A parameter that is frozen later stays averaged: its value
            stands still, and the average moves towards it.
        buffers: The averaged buffers.
        inside: True if the model holds the average now.
        left: True if the average was left in the model at the end of the fit.
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
        self.inside = self.left = self.fresh = False
        self._pruning = Pruning()
        self._raw: dict[tuple[int, str], Tensor] = {}
        self._exchanged: list[tuple[Source, Tensor]] = []
        self._versions: list[tuple[Tensor, int]] = []
        _holding.pop(module, None)
        for index in range(len(optimizers)):
            self.follow(index)

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

    def follow(self, index: int) -> None:
        """Add parameters that became trainable, and drop those that left the model. Call it before each step."""
        optimizer = self.optimizers[index]()
        now = [] if optimizer is None else trainable(optimizer)
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
            self.add(place, trainable(reference()) if reference() is not None else [], names)  # type: ignore[arg-type]

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
                    held = [average.averaged[position], *(remembered[position] for remembered in average.memory)]
                    if source.place in self._raw:
                        held.append(self._raw[source.place])
                    for tensor in held:
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
        holder = self.holder
        displaced = {} if holder is None else holder._displaced()
        for source, average in self.pairs():
            place, live = source.place, source.tensor
            if self.inside and place not in self._raw:
                average = live
            yield source, displaced.get(place, live), self.buffers.used(place, average)

    @property
    def holder(self) -> AveragedWeights | None:
        """The average that the model holds now, of this callback or of another one."""
        module = self.module
        return None if module is None else _holding.get(module)

    def _displaced(self) -> dict[tuple[int, str], Tensor]:
        """Return the raw tensors that this average has replaced in the model, by place."""
        displaced = {}
        for source, average in self._exchanged:
            copied = self._raw.get(source.place)
            displaced[source.place] = average if copied is None else shards.placed_as(copied, average)
        return displaced

    def raw(self) -> dict[str, Tensor]:
        """Return the raw values of the averaged tensors, under all their names."""
        return {name: raw for source, raw, _ in self.located() for name in source.names}

    def reduce_buffers(self, group: dist.ProcessGroup) -> None:
        """Compute the mean over ranks of the averaged buffers, for uses of the present average."""
        if not self.inside:
            self.buffers.reduce_over_ranks(group)

    def of_rank(self) -> dict[str, Tensor]:
        """Return this rank's averaged buffers that differ from those in use, by their paths in the state."""
        self.look_up()
        return self.buffers.of_rank()

    # ---- in and out of the model -------------------------------------------------------------------------------------

    @torch.no_grad()
    def exchange_(self) -> None:
        """Exchange the average and the model's tensors: all of them, or none of them if an error is raised."""
        with uninterrupted():
            module = self.alive()
            shards.reshard_(module)
            self.follow_pruning()
            moving, done = self._exchanged if self.inside else list(self.pairs()), []
            try:
                for source, average in moving:
                    self._swap_(source, average, self.inside)
                    done.append((source, average))
                if not self.inside and not self.estimates.done:
                    self.estimates.estimate_({source.place for source, _ in moving})
            except BaseException:
                for source, average in done:
                    self._swap_(source, average, not self.inside)
                if not self.inside:
                    self._raw = {}
                raise
            self.inside = not self.inside
            self._exchanged = moving if self.inside else []
            self._pruning.exchange_products(module, self.inside)
            if self.inside:
                _holding[module] = self
            else:
                self._raw = {}
                _holding.pop(module, None)

    def leave_in_model_(self) -> None:
        """Put the average into the model to stay, and note the versions of the parameters (:attr:`lost`)."""
        if not self.inside:
            self.exchange_()
        self.left = True
        held = (source.tensor for source, _ in self._exchanged if source.owner is None)
        self._versions = [(tensor, shards.version(tensor)) for tensor in held]

    @property
    def lost(self) -> bool:
        """True if the parameters were written to after the average was left in the model."""
        return self.inside and any(shards.version(tensor) != version for tensor, version in self._versions)

    @property
    def estimated(self) -> bool:
        """True if the vectors of spectral normalization belong to the present average, or there are no vectors."""
        return self.estimates.done or not self.started

    def estimate_(self) -> None:
        """Estimate the vectors of spectral normalization for the averaged weights, once after each update."""
        if not self.estimated and not self.inside:
            with raw_weights_in(self.alive()), self.exchanged():
                pass

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Context manager: average and model are exchanged; afterwards, also after an error, they are as before."""
        before = self.inside
        # A graph that was built before may go backward afterwards, when the weights have their values again.
        with keep_versions(source.tensor for source, _ in self.pairs()):
            try:
                self.exchange_()
                yield
            finally:
                if self.inside is not before:
                    self.exchange_()

    def _swap_(self, source: Source, average: Tensor, leaving: bool) -> None:
        """Put one average into the model or, if ``leaving``, the raw tensor, of which a copy is kept until all are."""
        live, place = source.live, source.place
        if live is None or live.shape != average.shape:  # the model has changed while the average was in it
            self._raw.pop(place, None)
            return
        (ours,), (theirs,) = shards.local_shards([self.buffers.used(place, average)]), shards.local_shards([live])
        if place in self._raw:
            theirs.copy_(self._raw[place] if leaving else ours)
        elif source.owner is None and ours.dtype == theirs.dtype and ours.device == theirs.device:
            foreach.swap_(ours, theirs)
        elif leaving:  # the module was moved to another device meanwhile
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)
        else:
            # Buffers are copied and never exchanged, so that what a validation writes to one stays out of the average.
            self._raw[place] = theirs.clone()
            theirs.copy_(ours)

    @torch.no_grad()
    def set_statistics_(self, layer: BatchNormBase, mean: Tensor, variance: Tensor) -> None:
        """Set estimated statistics in a layer of the model, which holds the average, and for later uses of it."""
        places = {source.place: average for source, average in self._exchanged}
        for key, value in (("running_mean", mean), ("running_var", variance)):
            live = buffer_of(layer, key)
            assert live is not None
            if (average := places.get((id(layer), key))) is not None:
                shards.copy_(live, self.buffers.set_estimate((id(layer), key), average, value))


@contextlib.contextmanager
def raw_weights_in(module: nn.Module) -> Iterator[None]:
    """Context manager: ``module`` holds its raw weights; afterwards it holds the average again that it held before."""
    holder = _holding.get(module)
    with contextlib.nullcontext() if holder is None or holder.lost else holder.exchanged():
        yield
