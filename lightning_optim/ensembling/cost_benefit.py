"""Measure how many members of an ensemble are worth their cost."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.base.metric_names import mode_of
from lightning_optim.base.shards import local_shards
from lightning_optim.base.suggestions import nearest, shown
from lightning_optim.ensembling.ensemble import Ensemble
from lightning_optim.ensembling.mean_prediction import Outputs
from lightning_optim.ensembling.standard_errors import standard_errors
from lightning_optim.plotting import best_index, canvas, check_metric, finish, make_room_above, mark_best
from lightning_optim.runtime.lightning import (
    CallbackBase,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
)
from lightning_optim.runtime.lightning.torch_internals import uncompiled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mode: TypeAlias = Literal["min", "max"]


@dataclass(frozen=True)
class Cost:
    """Hold the metric, the time and the memory of one number of members: a row of :class:`CostBenefit`.

    Attributes:
        members: Number of members.
        value: The metric, averaged over the groups of this many members.
        error: Standard error of ``value`` over the choice of members (:func:`standard_errors`); NaN with one member, or
            with ``groups=1``.
        lowest: The smallest value of these groups.
        highest: The largest value of these groups.
        seconds: Duration of one pass over the data, for the fastest of these groups.
        megabytes: Size of the weights and buffers, in 10^6 bytes, averaged over these groups.
    """

    members: int
    value: float
    error: float
    lowest: float
    highest: float
    seconds: float
    megabytes: float


@dataclass(frozen=True)
class CostBenefit:
    """Hold a metric for each number of members, with time and memory; prints as a table.

    Attributes:
        monitor: Name of the metric.
        rows: One :class:`Cost` for each number of members, from one on.
        mode: ``"min"`` if less is better, ``"max"`` if more is; ``None`` if this is not known.
    """

    monitor: str
    rows: tuple[Cost, ...]
    mode: Mode | None = None

    def __str__(self) -> str:
        names = ["members", self.monitor, *(field.name for field in fields(Cost)[2:])]
        cells = [[f"{getattr(row, field.name):.4g}" for field in fields(Cost)] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
        lines = (zip(line, widths, strict=True) for line in [names, *cells])
        return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in line) for line in lines)

    def plot(self, metric_or_optimizer: str | None = None, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot a metric over the number of members, with a star at the best number.

        The band is one standard error on both sides: by so much the curve would move with other members of the same
        kind. The whole curve moves together, so a difference between two numbers of members is more certain than the
        band is wide. What another validation set would change is not in it. The label of the star says how many other
        numbers of members have the best value within their band.

        Args:
            metric_or_optimizer: ``monitor``, ``"seconds"`` or ``"megabytes"``. Default: ``monitor``, and the seconds on
                a second axis.
            ax: Axes to draw on; a new figure by default.

        Returns:
            The figure and its axes.

        Raises:
            ValueError: If there is no such metric.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        metric = check_metric(metric_or_optimizer or self.monitor, (self.monitor, "seconds", "megabytes"))
        figure, axes = canvas(ax)
        numbers = [row.members for row in self.rows]
        if metric == self.monitor:
            self._draw_metric(axes, numbers)
            title = f"{self.monitor} of an ensemble over its number of members"
        else:
            axes.plot(numbers, [getattr(row, metric) for row in self.rows], marker="o", label=metric)
            axes.set_ylim(bottom=0.0)
            title = "Cost of an ensemble over its number of members"
        if metric_or_optimizer is None:
            self._draw_seconds(axes, numbers)
        units = {"seconds": "seconds per pass over the data", "megabytes": "megabytes of weights"}
        finish(axes, x="members", y=units.get(metric, metric), title=title, legend="upper right")
        return figure, axes

    def _draw_metric(self, axes: Axes, numbers: list[int]) -> None:
        values, errors = [row.value for row in self.rows], [row.error for row in self.rows]
        (line,) = axes.plot(numbers, values, marker="o", label=self.monitor)
        drawn, known = values, all(map(math.isfinite, errors))
        if known:
            low, high = ([value + sign * e for value, e in zip(values, errors, strict=True)] for sign in (-1.0, 1.0))
            label = "± 1 standard error over members"
            axes.fill_between(numbers, low, high, alpha=0.25, linewidth=0, color=line.get_color(), label=label)
            drawn = [*low, *high]
        best = best_index(values, self.mode or mode_of(self.monitor))
        if best is not None:
            label = f"best {values[best]:.4g}, {numbers[best]} member{'s' if numbers[best] > 1 else ''}"
            near = sum(abs(row.value - values[best]) <= row.error for row in self.rows) - 1
            if known and near:
                label += f", within one standard error of {near} other{'s' if near > 1 else ''}"
            mark_best(axes, numbers[best], values[best], label)
        make_room_above(axes, numbers[0], drawn)

    def _draw_seconds(self, axes: Axes, numbers: list[int]) -> None:
        """Draw the seconds on a second axis; an empty line on the first one is for its colour and the legend."""
        (shown,) = axes.plot([], [], linestyle="--", marker=".", label="seconds per pass over the data")
        times = axes.twinx()
        times.plot(numbers, [row.seconds for row in self.rows], linestyle="--", marker=".", color=shown.get_color())
        times.set_ylabel("seconds per pass over the data", color=shown.get_color())
        times.set_ylim(0.0, 1.5 * max(row.seconds for row in self.rows))  # room for the legend
        axes.set_zorder(times.get_zorder() + 1.0)  # or the seconds would cross the legend
        axes.patch.set_visible(False)


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
    mode: Mode | None = None,
) -> CostBenefit:
    r"""Measure a metric for each number of members, with the time of a pass and the memory of the weights.

    For ``k`` members the metric is the mean over groups of ``k``: the cyclic windows ``(i, …, i + k - 1)`` of the given
    order. Every member is in equally many groups, so a single good member does not decide the curve. With ``M`` members
    and all groups this takes as long as :math:`M \left(\binom{M}{2} + 1\right)` passes of one member.

    Args:
        members: The members, as for :class:`~lightning_optim.Ensemble`, which are copied; or the ``Ensemble`` itself,
            which is evaluated with its own ``outputs``, ``on`` and ``dim``.
        trainer: Runs ``trainer.validate`` on each group, with your validation step.
        data: The validation data, as for ``trainer.validate``. Default: the first member's own.
        monitor: The name under which the validation step logs the metric.
        outputs: As for :class:`~lightning_optim.Ensemble`; without a default there too.
        on: As for :class:`~lightning_optim.Ensemble`.
        dim: As for :class:`~lightning_optim.Ensemble`.
        groups: Largest number of groups of each size to evaluate, at least 1. Default: all. With 1 the curve is that of
            the members in their given order.
        mode: ``"min"`` if less is better, ``"max"`` if more is, for the mark of the best number in the plot. Default:
            known from the name of the metric, as of ``val_loss`` or ``accuracy``; otherwise there is no mark.

    Returns:
        The rows; ``print`` shows them as a table, ``plot()`` draws them.

    Raises:
        ValueError: If an argument is not allowed.
        MisconfigurationException: If ``monitor`` is not logged.

    Example::

        >>> from lightning.pytorch import Trainer
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
    if not isinstance(trainer, Trainer):
        raise ValueError(
            f"`trainer` must be a Trainer, got a {type(trainer).__name__}: write `cost_benefit(ensemble, trainer, data,"
            f" monitor={monitor!r})`"
        )
    if groups is not None:
        check_number("groups", groups, low=1, integer=True)
    if mode is not None:
        check_choice("mode", mode, Mode)
    ensemble = _ensemble_of(members, outputs, on, dim)
    timer = _ValidationTimer()
    callbacks, active = trainer.callbacks, ensemble._combined.active
    trainer.callbacks = [*callbacks, timer]
    try:
        sizes = range(1, len(ensemble.members) + 1)
        measured = [_measured(ensemble, size, groups, trainer, data, monitor, timer) for size in sizes]
    finally:
        trainer.callbacks, ensemble._combined.active = callbacks, active
    errors = standard_errors([(one.groups, one.values) for one in measured])
    rows = tuple(one.row(error) for one, error in zip(measured, errors, strict=True))
    return CostBenefit(monitor, rows, mode)


def _ensemble_of(members: Any, outputs: Outputs | None, on: str | None, dim: int | None) -> Ensemble:
    ensemble = uncompiled(members)  # of `torch.compile(ensemble)`
    if not isinstance(ensemble, Ensemble):
        return Ensemble(members, outputs=outputs, on=on, dim=dim)
    for name, given in {"outputs": outputs, "on": on, "dim": dim}.items():
        own = getattr(ensemble._combined, name)
        if given is not None and given != own:
            raise ValueError(f"`{name}={given!r}` is not the Ensemble's own `{name}={own!r}`: leave the argument out")
    return ensemble


@dataclass(frozen=True)
class _Measured:
    """Hold what was measured for one number of members: the groups, and a value of each for each of them."""

    groups: list[tuple[int, ...]]
    values: list[float]
    seconds: list[float]
    megabytes: list[float]

    def row(self, error: float) -> Cost:
        value, lowest, highest = statistics.fmean(self.values), min(self.values), max(self.values)
        seconds, megabytes = min(self.seconds), statistics.fmean(self.megabytes)
        return Cost(len(self.groups[0]), value, error, lowest, highest, seconds, megabytes)


def _measured(
    ensemble: Ensemble,
    size: int,
    groups: int | None,
    trainer: Trainer,
    data: Any,
    monitor: str,
    timer: _ValidationTimer,
) -> _Measured:
    found = _Measured(_windows(len(ensemble.members), size)[:groups], [], [], [])
    for group in found.groups:
        ensemble._combined.active = group
        trainer.validate(ensemble, data, verbose=False)
        if monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"`monitor={monitor!r}` is not logged in validation{nearest(monitor, trainer.callback_metrics) or '.'}"
                f" Log it in `validation_step`, or pass one of {shown(sorted(trainer.callback_metrics))}."
            )
        found.values.append(float(trainer.callback_metrics[monitor]))
        found.seconds.append(timer.seconds)
        found.megabytes.append(_bytes([ensemble.members[index] for index in group]) / 1e6)
    rank_zero_info(
        f"Members: {size} of {len(ensemble.members)}, {monitor} {statistics.fmean(found.values):.4g},"
        f" {min(found.seconds):.3g} s per pass"
    )
    return found


def _windows(count: int, size: int) -> list[tuple[int, ...]]:
    starts = range(count if size < count else 1)
    return [tuple((start + offset) % count for offset in range(size)) for start in starts]


def _bytes(members: list[nn.Module]) -> int:
    # By storage, so that weights which members share count once.
    tensors = itertools.chain.from_iterable((*member.parameters(), *member.buffers()) for member in members)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local_shards(tensors)
    }
    return sum(storages.values())


class _ValidationTimer(CallbackBase):
    """Measure the seconds from the first to the last hook of a validation."""

    seconds = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.seconds = time.perf_counter() - self._begin
