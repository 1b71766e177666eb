"""How many members are worth their cost."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from lightning_optim.base.shards import local_shards
from lightning_optim.ensembling.ensemble import Ensemble
from lightning_optim.ensembling.mean_prediction import Outputs
from lightning_optim.plotting import canvas
from lightning_optim.runtime.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
)


@dataclass(frozen=True)
class Cost:
    """One row of :class:`CostBenefit`.

    Attributes:
        members: The number of members.
        value: The metric, averaged over the groups of so many members that were tried.
        lowest: The smallest of them.
        highest: The largest of them.
        seconds: Of one pass over the data, the fastest of these groups.
        megabytes: Of the weights and buffers, in 10^6 bytes, averaged over these groups.
    """

    members: int
    value: float
    lowest: float
    highest: float
    seconds: float
    megabytes: float


@dataclass(frozen=True)
class CostBenefit:
    """A metric over the number of members, beside time and memory; it prints as a table.

    Attributes:
        monitor: The name of the metric.
        rows: One :class:`Cost` for each number of members, from one on.
    """

    monitor: str
    rows: tuple[Cost, ...]

    def __str__(self) -> str:
        names = ["members", self.monitor, *(field.name for field in fields(Cost)[2:])]
        cells = [[f"{getattr(row, field.name):.4g}" for field in fields(Cost)] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
        lines = (zip(line, widths, strict=True) for line in [names, *cells])
        return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in line) for line in lines)

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Plot the metric, with the range over the groups, and the seconds of a pass.

        Args:
            ax: Matplotlib axes to draw into; ``None`` makes a figure.

        Returns:
            The figure, and the axes of the metric.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        figure, axes = canvas(ax)
        numbers = [row.members for row in self.rows]
        lowest, highest = [row.lowest for row in self.rows], [row.highest for row in self.rows]
        axes.fill_between(numbers, lowest, highest, alpha=0.2, linewidth=0)
        axes.plot(numbers, [row.value for row in self.rows], marker="o", label=self.monitor)
        axes.set(xlabel="members", ylabel=self.monitor, xticks=numbers)
        times = axes.twinx()
        times.plot(numbers, [row.seconds for row in self.rows], color="gray", linestyle="--", marker=".")
        times.set(ylabel="seconds of a pass (dashed)", ylim=(0, None))
        return figure, axes


def cost_benefit(
    members: Sequence[LightningModule] | Ensemble,
    trainer: Trainer,
    data: Any = None,
    *,
    monitor: str,
    outputs: Outputs | None = None,
    on: str | None = None,
    dim: int | None = None,
    groups: int | None = None,
) -> CostBenefit:
    r"""A metric over the number of members, beside the time of a pass and the memory of the weights.

    For each number ``k`` the metric is the mean over groups of ``k`` members: the cyclic windows ``(i, …, i + k - 1)``
    of the given order. Each member is in equally many of them, so one lucky member does not decide the curve, as in a
    single order it would. With ``M`` members and all windows this takes as much as
    :math:`M \left(\binom{M}{2} + 1\right)` passes of one member.

    Args:
        members: The members, as for :class:`~lightning_optim.Ensemble`, which are copied; or an ``Ensemble``, the one
            that will be used: it is evaluated itself, and has its own ``outputs``, ``on`` and ``dim``.
        trainer: Runs ``trainer.validate`` on each group, through the user's validation step.
        data: The validation data, as for ``trainer.validate``; ``None`` for the first member's own.
        monitor: The name under which the validation logs the metric.
        outputs: As for :class:`~lightning_optim.Ensemble`, of which it has no default either.
        on: As for :class:`~lightning_optim.Ensemble`.
        dim: As for :class:`~lightning_optim.Ensemble`.
        groups: How many windows to try for each number at most; ``None`` for all. With 1 the curve is that of the
            members in their given order.

    Returns:
        The rows, with ``plot()``; printed, they are a table.

    Raises:
        ValueError: If an argument is not allowed.
        MisconfigurationException: If ``monitor`` is not logged.

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Model(BoringModel):
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("loss", self(batch).square().mean())
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        >>> ensemble = Ensemble([Model(), Model(), Model()], outputs="values")
        >>> found = cost_benefit(ensemble, Trainer(**quiet), monitor="loss")
        >>> [row.members for row in found.rows], found.rows[0].value > found.rows[2].value
        ([1, 2, 3], True)
    """
    if groups is not None and (not isinstance(groups, int) or groups < 1):
        raise ValueError(f"`groups` is the number of groups of one size, at least 1, or None for all, got {groups!r}")
    ensemble = _ensemble_of(members, outputs, on, dim)
    watch = _Watch()
    callbacks, active = trainer.callbacks, ensemble._combined.active
    trainer.callbacks = [*callbacks, watch]
    try:
        sizes = range(1, len(ensemble.members) + 1)
        rows = [_row(ensemble, size, groups, trainer, data, monitor, watch) for size in sizes]
    finally:
        trainer.callbacks, ensemble._combined.active = callbacks, active
    return CostBenefit(monitor, tuple(rows))


def _ensemble_of(members: Any, outputs: Outputs | None, on: str | None, dim: int | None) -> Ensemble:
    ensemble = getattr(members, "_orig_mod", members)  # of `torch.compile(ensemble)`
    if not isinstance(ensemble, Ensemble):
        return Ensemble(members, outputs=outputs, on=on, dim=dim)
    for name, given in {"outputs": outputs, "on": on, "dim": dim}.items():
        own = getattr(ensemble._combined, name)
        if given is not None and given != own:
            raise ValueError(f"`{name}={given!r}`, but the Ensemble that is given has `{name}={own!r}`: leave it out")
    return ensemble


def _row(
    ensemble: Ensemble, size: int, groups: int | None, trainer: Trainer, data: Any, monitor: str, watch: _Watch
) -> Cost:
    values, seconds, megabytes = [], [], []
    for group in _windows(len(ensemble.members), size)[:groups]:
        ensemble._combined.active = group
        trainer.validate(ensemble, data, verbose=False)
        if monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"`monitor={monitor!r}` is not logged in validation, where there are {sorted(trainer.callback_metrics)}"
            )
        values.append(float(trainer.callback_metrics[monitor]))
        seconds.append(watch.seconds)
        megabytes.append(_bytes([ensemble.members[index] for index in group]) / 1e6)
    row = Cost(size, statistics.fmean(values), min(values), max(values), min(seconds), statistics.fmean(megabytes))
    rank_zero_info(f"Members: {size} of {len(ensemble.members)}, {monitor} {row.value:.4g}, {row.seconds:.3g} s a pass")
    return row


def _windows(count: int, size: int) -> list[tuple[int, ...]]:
    starts = range(count if size < count else 1)
    return [tuple((start + offset) % count for offset in range(size)) for start in starts]


def _bytes(members: list[nn.Module]) -> int:
    # By storage: what members share counts once.
    tensors = itertools.chain.from_iterable((*member.parameters(), *member.buffers()) for member in members)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local_shards(tensors)
    }
    return sum(storages.values())


class _Watch(Callback):
    """The seconds from the first to the last hook of a validation."""

    seconds = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.seconds = time.perf_counter() - self._begin
