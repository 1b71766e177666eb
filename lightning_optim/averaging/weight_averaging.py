"""Weight averaging, as a callback: one average, the same in validation, files, test and predict."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_optim import state, tensors
from lightning_optim.averaging.averages import Average, copy_of
from lightning_optim.callback import OptimCallback
from lightning_optim.schedules import check_number
from lightning_optim.slots import Slot


@dataclass
class _Source:
    """A tensor of the model that is averaged: a parameter, or the present content of a module's buffer.

    Parameters are kept, since FSDP2 puts gathered ones in their place at times. Buffers are looked up, since modules
    bind them anew.
    """

    name: str
    parameter: nn.Parameter | None = None
    owner: nn.Module | None = None
    key: str = ""

    @property
    def tensor(self) -> Tensor:
        tensor = self.parameter if self.owner is None else self.owner._buffers[self.key]
        assert tensor is not None
        return tensor


class WeightAveraging(OptimCallback):
    r"""Keep an average of the weights over the steps, and evaluate with it; the raw weights go on training.

    Each parameter is averaged when *its* optimizer really stepped; frozen parameters are not copied. Floating-point
    buffers in the ``state_dict`` (running statistics) are averaged with the first optimizer's weights; integer and bool
    ones are the latest. Averages of half-precision weights are kept in fp32.

    With ``evaluate=True`` there is one truth, as soon as the average has started: the averaged weights are what
    validation sees, so what is monitored, what every checkpoint holds as ``state_dict`` (weights-only files too), what
    is restored as the best, and what ``test``, ``predict`` and ``load_from_checkpoint`` use. The raw weights are in
    this callback's state, and training resumes from them. An average that never started is never used.

    Args:
        average: What kind, such as ``EMA(0.999)``.
        start: The optimizer steps that are left out before the first update; a float in [0, 1] is a fraction of the
            run.
        every: Optimizer steps between two updates, >= 1. The first is after step ``start + 1``. An EMA's horizon in
            steps does not depend on it.
        evaluate: Whether validation and files use the average. Of several averages at most one may.
        apply_at_end: Whether the module ends with the average when the fit ends normally.
            ``EarlyStopping(restore_best=True)`` goes before.
        name: Tells two averages of one kind apart in checkpoints.

    Raises:
        ValueError: If an argument is none of these.
        MisconfigurationException: For two evaluated averages, beside Lightning's own averaging, or for a fraction in a
            run without a known end.

    Example::

        >>> from lightning_optim import EMA, WeightAveraging
        >>> WeightAveraging(EMA(0.999), start=0.5)
        WeightAveraging{'average': 'EMA()'}
    """

    slot = Slot.AVERAGE
    touches = frozenset({"weights"})
    final_rank = 2

    def __init__(
        self,
        average: Average,
        start: int | float = 0,
        every: int = 1,
        evaluate: bool = True,
        apply_at_end: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if not isinstance(average, Average):
            raise ValueError(f"`average={average!r}` must be an average, such as EMA(0.999)")
        if isinstance(start, float):
            check_number("start", start, low=0.0, high=1.0)
        else:
            check_number("start", start, low=0, integer=True)
        check_number("every", every, low=1, integer=True)
        self.average, self.start, self.every = average, start, every
        self.evaluates, self.apply_at_end = evaluate, apply_at_end
        self.reset()

    @property
    def identity(self) -> dict[str, Any]:
        return {"average": self.average.identity}

    @property
    def needs_total(self) -> bool:
        return isinstance(self.start, float) or self.average.scheduled

    def reset(self) -> None:
        self._averages: list[Average] = []
        self._sources: list[list[_Source]] = []
        self._loaded: dict[str, Any] | None = None
        self._inside = False  # whether the module holds the average now
        self._raw: dict[str, Tensor] = {}  # raw weights beside, where they cannot change places with the average

    @property
    def started(self) -> bool:
        """Whether there is an average that could be used."""
        return any(average.started for average in self._averages)

    # ---- life --------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.evaluates:
            fit, loop, strategy = self._running, trainer.fit_loop.epoch_loop.val_loop, trainer.strategy
            fit.average = self
            fit.replace(loop, "run", self._evaluating(loop.run, pl_module))
            fit.replace(
                strategy, "lightning_module_state_dict", self._saving(strategy.lightning_module_state_dict, trainer)
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start_step = int(self.start * self._running.total) if isinstance(self.start, float) else self.start
        tensors.reshard_(pl_module)
        self._sources = _sources(pl_module, trainer.optimizers)
        self._averages = [copy.deepcopy(self.average) for _ in trainer.optimizers]
        if self._loaded is not None:
            extra, self._loaded = self._loaded, None
            self._take_over(extra)

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        index = trainer.optimizers.index(optimizer)
        step = self.steps[index]
        if step > self._start_step and (step - self._start_step - 1) % self.every == 0:
            self._averages[index].update_([source.tensor for source in self._sources[index]], step=step)

    def write_final_(self, pl_module: LightningModule) -> bool:
        if not self.apply_at_end or not self.started:
            return False
        self._exchange(pl_module)
        return True

    # ---- in and out of the module ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged_weights(self, pl_module: LightningModule) -> Iterator[None]:
        """Within this, the module holds the averaged weights, if there are any; afterwards the raw ones again."""
        if self._inside or not self.started:
            yield
            return
        self._exchange(pl_module)
        try:
            yield
        finally:
            self._exchange(pl_module)

    @torch.no_grad()
    def _exchange(self, pl_module: LightningModule) -> None:
        """Let average and raw weights change places: the raw ones lie in the average's storage meanwhile."""
        tensors.reshard_(pl_module)
        for source, averaged in self._pairs():
            (ours,), (theirs,) = tensors.local([averaged]), tensors.local([source.tensor])
            if ours.dtype == theirs.dtype and ours.device == theirs.device:
                tensors.exchange_(ours, theirs)
            elif self._inside:
                theirs.copy_(self._raw.pop(source.name))
            else:
                self._raw[source.name] = theirs.clone()
                theirs.copy_(ours)
        self._inside = not self._inside

    def _pairs(self) -> Iterator[tuple[_Source, Tensor]]:
        for sources, average in zip(self._sources, self._averages, strict=True):
            if average.started:
                yield from zip(sources, average.averaged, strict=True)

    def averaged_state(self) -> dict[str, Tensor]:
        """The averaged tensors by name; empty before the first update, and while the module itself holds them."""
        return {} if self._inside else {source.name: averaged for source, averaged in self._pairs()}

    def _evaluating(self, run: Callable[[], Any], pl_module: LightningModule) -> Callable[[], Any]:
        """The validation loop, with the average in the module from its first hook to its last."""

        def evaluate() -> Any:
            with self.averaged_weights(pl_module):
                return run()

        return evaluate

    def _saving(self, state_dict: Callable[[], dict[str, Any]], trainer: Trainer) -> Callable[[], dict[str, Any]]:
        """The ``state_dict`` of every file, with the average in place of the raw weights."""

        def save() -> dict[str, Any]:
            saved = state_dict()
            for source, averaged in self._pairs() if not self._inside else ():
                value = averaged.to(source.tensor.dtype)
                if isinstance(value, DTensor):  # of a sharded model: whole tensors on rank 0, or each rank's shard
                    value = value.cpu() if state.is_distributed(trainer) else value.full_tensor().cpu()
                name = source.name if source.name in saved else source.name.replace("_orig_mod.", "")
                if name in saved:
                    saved[name] = value
            return saved

        return save

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        raw, averaged = {}, {}
        for source, average in self._pairs():
            live = source.tensor
            if self.evaluates:
                raw[source.name] = self._raw_of(source, average) if self._inside else live
            if not self.evaluates or average.dtype != live.dtype:
                averaged[source.name] = live if self._inside and source.name not in self._raw else average
        return {"counters": [average.counters for average in self._averages], "raw": raw, "averaged": averaged}

    def _raw_of(self, source: _Source, average: Tensor) -> Tensor:
        """The raw tensor while the module holds the average: kept beside, else in the average's storage."""
        kept = self._raw.get(source.name)
        return average if kept is None else tensors.placed_as(kept, source.tensor)

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._loaded = extra or None

    @torch.no_grad()
    def _take_over(self, extra: dict[str, Any]) -> None:
        """The average from the state, else from the module, which has the file's ``state_dict``; then raw weights."""
        for counters, sources, average in zip(extra["counters"], self._sources, self._averages, strict=False):
            if not counters:
                continue
            averaged = [copy_of(source.tensor) for source in sources]
            for source, own in zip(sources, averaged, strict=True):
                if source.name in extra["averaged"]:
                    tensors.copy_(own, extra["averaged"][source.name])
                if source.name in extra["raw"]:
                    tensors.copy_(source.tensor, extra["raw"][source.name])
            average.load(counters, averaged)

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds the average as loaded state: the model's own tensors do not travel with the callback."""
        held = {**super().__getstate__(), "_sources": [], "_averages": [], "_raw": {}, "_inside": False}
        if self.started:
            held["_loaded"] = state.export(self.extra_state(), None)
        return held


def _sources(module: nn.Module, optimizers: list[Optimizer]) -> list[list[_Source]]:
    """What is averaged with each optimizer: its trainable parameters; with the first, floating-point buffers too."""
    names = tensors.parameter_names(module)
    sources = []
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        sources.append([_Source(names[id(p)], parameter=p) for p in parameters if id(p) in names])
    for owner in module.modules() if sources else ():
        for key, buffer in owner._buffers.items():
            name = names.pop(id(buffer), None)  # a shared buffer once
            if name is not None and buffer is not None and (buffer.is_floating_point() or buffer.is_complex()):
                sources[0].append(_Source(name, owner=owner, key=key))
    return sources
