"""Sort callbacks into the order in which they act within a step; define what the session of a fit needs from them."""

from __future__ import annotations

import enum
from collections.abc import Container
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.runtime.lightning import LightningModule, Trainer


class Slot(enum.IntEnum):
    """Place of a callback within one step, whatever the order of the user's list.

    The optimizer's step itself, and projections after it, come between CLIP and AVERAGE.
    """

    ACCUMULATE = 0
    PENALIZE = 1
    MEASURE = 2
    CLIP = 3
    AVERAGE = 4
    STOP = 5


def callbacks_in(trainer: Trainer, slot: Slot) -> list[Any]:
    """Return the callbacks of the Trainer's list that act in a slot."""
    return [callback for callback in trainer.callbacks if getattr(callback, "slot", None) is slot]


def in_order(callbacks: Container[SessionCallback], trainer: Trainer) -> list[Any]:
    """Return those of some callbacks that are in the Trainer's list, in its order, which is that in which they act.

    A learning-rate finder takes them out of that list for its trial steps, which they must not see.
    """
    return [callback for callback in trainer.callbacks if callback in callbacks]


def arrange(trainer: Trainer) -> None:
    """Sort the callbacks that have a slot among their places in the list; every other callback keeps its place.

    So the order of the user's list changes no result of this package's callbacks. A user's callback runs between those
    that end up around it. A new list is bound, since Lightning iterates over the present one: sorting that in place
    would skip one ``setup`` and run another twice.
    """
    ordered = iter([callback for slot in Slot for callback in callbacks_in(trainer, slot)])
    trainer.callbacks = [
        next(ordered) if isinstance(getattr(callback, "slot", None), Slot) else callback
        for callback in trainer.callbacks
    ]


class SessionCallback(Protocol):
    """Callback as the session of a fit sees it: every ``OptimCallback``."""

    steps: list[int]
    summary: bool
    fit: Any
    _token: str
    _ancestors: tuple[str, ...]
    ran_in: Literal["", "a copy", "other processes"]
    not_returned: str

    @property
    def slot(self) -> Slot | None:
        """Place within a step."""

    @property
    def touches(self) -> frozenset[str]:
        """``"gradients"``, ``"weights"``, or both: what the callback reads or writes in a step."""

    @property
    def evaluates(self) -> bool:
        """True if validation uses weights that the callback holds."""

    @property
    def final_rank(self) -> int | None:
        """Priority of :meth:`write_final_`: the lowest comes first."""

    @property
    def final_opt_out(self) -> str:
        """Words for a message: how to keep it from writing final weights; empty if it writes none."""

    @property
    def gathers_ranks(self) -> bool:
        """True if its state is gathered from all ranks for each checkpoint."""

    @property
    def needs_total(self) -> bool:
        """True if it needs the number of steps of the whole run."""

    @property
    def stays(self) -> frozenset[str]:
        """Attributes that are not sent back from a process that a launcher started."""

    def describe_step(self, index: int) -> tuple[str, str]:
        """Return what it does before, and after, a step of an optimizer, for the lines at the start."""

    def describe_run(self) -> str:
        """Return what it does beside the steps, for the lines at the start."""

    def report(self) -> str:
        """Return what it has done, for the line at the end."""

    def on_before_weight_update(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Act just before a step that will be taken moves the weights."""

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Act after a step."""

    def write_final_(self, pl_module: LightningModule) -> bool:
        """Write the weights that the module holds after the fit; return whether there were any to write."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes of a copy."""

    def resume_ended(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the loaded state in a run with nothing left to train."""


class EvaluatedAverage(Protocol):
    """Average that validation and checkpoints use instead of the raw weights."""

    def averaged_state(self) -> dict[str, Tensor]:
        """Return the averaged tensors by their names in the ``state_dict``; empty before the first update."""


class AccumulationWindows(Protocol):
    """Accumulation windows, one for each optimizer, as a hand-written step sees them."""

    @property
    def is_open(self) -> bool:
        """True if a window holds gradients of a step that was not taken yet."""

    def window(self, trainer: Trainer, index: int) -> Any:
        """Return the open window of the optimizer with this index, or open one."""

    def weigh(self, window: Any) -> Tensor | None:
        """Add the present micro-batch to a window; return the factor for its loss, ``None`` if all weigh the same."""

    def closing(self, index: int) -> AbstractContextManager[None]:
        """Context manager: the step of the optimizer with this index is that of its window."""
