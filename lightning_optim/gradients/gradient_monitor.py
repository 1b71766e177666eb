"""Measure and log norms of gradients and of updates, and suggest a bound for clipping."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.base.norms import tensor_norms
from lightning_optim.base.ring_buffer import Ring
from lightning_optim.gradients.gradient_clipping import GradientClipping
from lightning_optim.gradients.module_clipping import bound_of_trainer
from lightning_optim.gradients.norm_plot import Norms, draw, name_of_norm
from lightning_optim.gradients.step_skipping import SkippedSteps
from lightning_optim.plotting import canvas
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import LightningModule, Trainer, rank_zero_info
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.ran_elsewhere import check_no_copy_ran
from lightning_optim.runtime.step import OptimizerStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Level: TypeAlias = Literal["total", "module", "parameter"]

_BEFORE, _AFTER, _UPDATE, _CLIPPED, _BOUND = _COLUMNS = range(5)  # of the history


@dataclass
class _Measurement:
    """Hold values of one optimizer's step, and tensors from which further values are computed after it."""

    norm: Tensor
    logs: bool
    weights: list[Tensor] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)


class GradientMonitor(OptimCallback):
    r"""Measure the gradients before and after clipping, and how far each step moves the weights.

    At the steps at which Lightning logs (``log_every_n_steps``), for all weights of an optimizer together:

    * ``gradients/norm`` and ``gradients/norm_clipped``: the norm before and after clipping, unscaled and over all
      ranks;
    * ``gradients/update_ratio``: :math:`\lVert \Delta w \rVert / \lVert w \rVert` of the step. About 1e-3 is usual;
      below 1e-5 a layer hardly learns, above 1e-2 its training is unstable;
    * ``gradients/share_clipped``: the share of the steps in the history that clipping made shorter;
    * ``gradients/skipped``: the number of steps so far that had gradients and did not happen.

    With ``level="module"`` or ``"parameter"`` the first three are also logged for each module that holds parameters
    itself, or for each parameter, as ``gradients/norm/encoder.0`` and so on.

    The norm of each step is kept on its device, so that :meth:`suggest_clip` and :meth:`plot` use all steps and not
    only those that were logged. Clipping takes the same norm: its exponent is the ``norm_type`` of the first clipping
    policy, or 2 without clipping. A step that is not logged costs one norm, and nothing beside clipping by norm;
    nothing waits for the device. A logged step needs a copy of the weights for ``update_ratio``.

    Policies that scale by a norm know if a step was clipped, and so does ``Trainer(gradient_clip_val=…)``. For other
    policies, and for modules that clip themselves, it is seen from the norms before and after, at logged steps.

    Args:
        level: Norms that are logged: ``"total"``; or for each ``"module"`` or ``"parameter"`` as well, which are many
            values if the model is large.
        history: Number of steps of each optimizer that are kept, >= 1. Default 1000, which takes a few kB.
        name: Distinguishes two such callbacks in checkpoints.
        summary: See :class:`OptimCallback`.

    Attributes:
        skipped: Number of steps of each optimizer that had gradients and did not happen: their norm was not finite,
            they were dropped, or the GradScaler skipped them.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_optim import GradientClipping, GradientMonitor
        >>> monitor = GradientMonitor()
        >>> trainer = Trainer(max_steps=20, callbacks=[monitor, GradientClipping(1.0)], barebones=True)
        >>> trainer.fit(BoringModel())
        >>> 0.0 < monitor.suggest_clip(percentile=50.0) < monitor.suggest_clip(percentile=90.0)
        True

    For a Trainer: ``Trainer(callbacks=[GradientMonitor()])``.
    """

    slot = Slot.MEASURE
    touches = frozenset({"gradients"})

    def __init__(
        self, level: Level = "total", history: int = 1000, name: str | None = None, summary: bool = True
    ) -> None:
        super().__init__(name, summary)
        self.level = check_choice("level", level, Level)
        self.history = check_number("history", history, low=1, integer=True)
        self.reset()

    def reset(self) -> None:
        self._histories: list[Ring] = []
        self._measurements: dict[int, _Measurement] = {}
        self._pending = SkippedSteps()
        self._clipping: GradientClipping | None = None
        self.skipped: list[int] = []
        self._measured: list[tuple[str, float]] = []  # class of each optimizer, and the exponent of its norm

    def describe_step(self, index: int) -> tuple[str, str]:
        return "measure norms", ""

    def report(self) -> str:
        told = {place: self._norms(place).in_words for place, history in enumerate(self._histories) if history.count}
        several = len(self._histories) > 1
        words = [f"of optimizer {place}{text}" if several else text for place, text in told.items() if text]
        return f"gradient norm{' ' if several else ''}{'; '.join(words)}" if words else ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        found = (callback for callback in trainer.callbacks if isinstance(callback, GradientClipping))
        self._clipping = next(found, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._extend(len(trainer.optimizers))
        self._measured = [(type(one).__name__, self._norm_type(place)) for place, one in enumerate(trainer.optimizers)]

    def _extend(self, optimizers: int) -> None:
        missing = optimizers - len(self._histories)
        self._histories += [Ring(self.history) for _ in range(missing)]
        self.skipped += [0] * missing

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        if not step.grads:
            return
        self._pending.before_step(step.index)
        found = self._measurements[step.index] = _Measurement(step.norm(self._norm_type(step.index)), step.logs)
        if step.logs:
            found.weights, found.copies, found.labels = step.weights, _copies(step.weights), self._labels(step)
            found.values |= {"gradients/norm": found.norm, **self._by_label("gradients/norm", step)}

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        self._pending.after_step(step.index)
        found = self._measurements.get(step.index)
        if found is None:
            return
        unknown = _constant(math.nan, found.norm.device, found.norm.dtype)
        row = [unknown for _ in _COLUMNS]
        row[_BEFORE] = found.norm
        if self._clipping is not None:
            row[_CLIPPED] = _scalar(self._clipping.clipped(step.index), unknown)
            row[_BOUND] = _scalar(self._clipping.bound_in_force(step), unknown)
        else:
            bound = bound_of_trainer(trainer)
            if bound is not None and math.isfinite(bound):
                row[_CLIPPED], row[_BOUND] = (found.norm > bound).to(found.norm), _scalar(bound, unknown)
        if found.logs:
            # Before the norm after clipping is asked for: then it is known.
            only_limits = self._only_limits(trainer, step)
            row[_AFTER] = step.norm(self._norm_type(step.index))
            row[_UPDATE] = self._measure_update(found)
            if row[_CLIPPED] is unknown and only_limits:
                row[_CLIPPED] = (row[_AFTER] < found.norm).to(found.norm)
            found.values |= {"gradients/norm_clipped": row[_AFTER], "gradients/update_ratio": row[_UPDATE]}
            found.values |= self._by_label("gradients/norm_clipped", step)
        history = self._histories[step.index]
        history.append(torch.stack(row))
        if found.logs and row[_CLIPPED] is not unknown:
            found.values["gradients/share_clipped"] = history.rows[:, _CLIPPED].nanmean()

    def _measure_update(self, found: _Measurement) -> Tensor:
        """Return the update ratio of all weights, and log those of modules or parameters."""
        weights, copies = found.weights, found.copies
        sizes = tensor_norms(copies)
        torch._foreach_sub_(shards.local_shards(copies), shards.local_shards([weight.detach() for weight in weights]))
        moves = tensor_norms(copies)
        found.weights, found.copies = [], []
        if found.labels:
            moved, held = (_norms_by_label(found.labels, norms, 2.0) for norms in (moves, sizes))
            found.values |= {f"gradients/update_ratio/{label}": _ratio(moved[label], held[label]) for label in moved}
        return _ratio(torch.linalg.vector_norm(moves), torch.linalg.vector_norm(sizes))

    def _by_label(self, prefix: str, step: OptimizerStep) -> dict[str, Tensor]:
        """Return the gradient norm of each module or parameter, by the name under which it is logged."""
        if self.level == "total":
            return {}
        norm_type = self._norm_type(step.index)
        found = _norms_by_label(self._labels(step), tensor_norms(step.dense[1], norm_type), norm_type)
        return {f"{prefix}/{label}": norm for label, norm in found.items()}

    def _labels(self, step: OptimizerStep) -> list[str]:
        """Return the name of each weight, or that of its module, for the log."""
        if self.level == "total":
            return []
        return [name.rpartition(".")[0] or "root" for name in step.names] if self.level == "module" else step.names

    def _norm_type(self, index: int) -> float:
        return 2.0 if self._clipping is None else self._clipping.norm_type_of(index)

    def _only_limits(self, trainer: Trainer, step: OptimizerStep) -> bool:
        """Return True if what clips only limits gradients: then a norm that became smaller was clipped."""
        if self._clipping is None:
            # Many modules override `configure_gradient_clipping` and do nothing there.
            has_written = step.known_norm(self._norm_type(step.index)) is None
            return bound_of_trainer(trainer) is not None and has_written
        policies = self._clipping.policies_of(step.index)
        return bool(policies) and all(policy.limits for policy in policies)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for index, count in self._pending.pop().items():
            self.skipped[index] += count
        for index, found in self._measurements.items():
            if found.logs:
                values: dict[str, Tensor | float] = {**found.values, "gradients/skipped": float(self.skipped[index])}
                for name, value in values.items():
                    self.log_value(pl_module, name, value, trainer.optimizers[index])
        self._measurements.clear()

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _rows(self, optimizer: int) -> Tensor:
        known = optimizer < len(self._histories) and self._histories[optimizer].count
        if not known:
            check_no_copy_ran(self)
            return torch.zeros(0, len(_COLUMNS))
        rows = self._histories[optimizer].rows.cpu()
        return pad(rows, (0, len(_COLUMNS) - rows.shape[1]), value=math.nan)  # an earlier version kept no bound

    def suggest_clip(self, percentile: float = 90.0, optimizer: int | None = None) -> float:
        """Return a bound for clipping by norm: a percentile of the norms before clipping in the history.

        Train some hundred steps without clipping, or with the clipping that you have. A bound at the 90th percentile
        clips one step in ten, which is enough against spikes. A bound that clips half of the steps acts as a learning
        rate. A line of the log says of which norm and which optimizer the bound is.

        Args:
            percentile: In [0, 100].
            optimizer: The index of the optimizer; needed if there are several.

        Raises:
            ValueError: If ``percentile`` is out of its range, or ``optimizer`` is not the index of an optimizer; or
                left out, although there are several.
            RuntimeError: If no step with a finite norm was measured yet.
        """
        check_number("percentile", percentile, low=0.0, high=100.0)
        index = self._index("optimizer", optimizer)
        if index is None:
            raise ValueError(
                f"GradientMonitor measured several optimizers, {self._names()}: name one, as in"
                " `suggest_clip(optimizer=0)`."
            )
        norms = self._norms(index)
        bound = _percentile(norms, percentile)
        rank_zero_info(
            f"The {_ordinal(percentile)} percentile of the last {len(norms.before)} gradient norms"
            f" ({name_of_norm(norms.norm_type)}) of {norms.optimizer} is {bound:.4g}."
        )
        return bound

    def plot(self, metric_or_optimizer: int | None = None, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the norms in the history before and after clipping over the steps, and the bound that was in force.

        The bound of a schedule or of a policy that adapts, such as ``AutoClip``, is that of each step; that of
        ``ZClip`` is the norm above which it clips. Where no bound is on the norm of all gradients, as where each
        pattern has its own, none is drawn. For one optimizer the 90th percentile, which :meth:`suggest_clip` returns,
        is drawn too.

        Args:
            metric_or_optimizer: The index of the optimizer. Default: all of them, one colour for each.
            ax: The axes to draw on. Default: those of a new figure.

        Returns:
            The figure and its axes.

        Raises:
            ValueError: If ``metric_or_optimizer`` is not the index of an optimizer.
            RuntimeError: If no step with a finite norm was measured yet.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        index = self._index("metric_or_optimizer", metric_or_optimizer)
        indices = range(len(self._histories)) if index is None else [index]
        norms = [one for one in map(self._norms, indices) if one.before.isfinite().any()] or [self._norms(indices[0])]
        suggestion = ("suggested bound (90th percentile)", _percentile(norms[0], 90.0))
        figure, axes = canvas(ax)
        draw(axes, norms, suggestion if len(norms) == 1 else None)
        return figure, axes

    def _index(self, argument: str, value: int | None) -> int | None:
        """Return the index of an optimizer; ``None`` if several were measured and none is named."""
        count = len(self._histories)
        if isinstance(value, str):
            raise ValueError(
                f"`{argument}` must be the index of an optimizer, {self._names() or 'such as 0'}, got {value!r}:"
                f" {type(self).__name__} knows the norms of gradients, and no metric"
            )
        if value is not None:
            check_number(argument, value, low=0, integer=True)
            if count and value >= count:
                raise ValueError(f"`{argument}` must be the index of an optimizer, {self._names()}, got {value}")
        return value if value is not None or count > 1 else 0

    def _names(self) -> str:
        return ", ".join(map(self._name, range(len(self._histories))))

    def _name(self, index: int) -> str:
        return f"{index} ({self._measured[index][0]})" if index < len(self._measured) else str(index)

    def _norms(self, index: int) -> Norms:
        rows = self._rows(index)
        return Norms(
            optimizer=f"optimizer {self._name(index)}",
            norm_type=self._measured[index][1] if index < len(self._measured) else 2.0,
            last=self.steps[index] if index < len(self.steps) else len(rows),
            before=rows[:, _BEFORE],
            after=rows[:, _AFTER],
            bound=rows[:, _BOUND],
            clipped=rows[:, _CLIPPED],
        )

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return {
            "recent": [history.state_dict() for history in self._histories],
            "skipped": list(self.skipped),
            "measured": [list(one) for one in self._measured],
        }

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._extend(len(extra["recent"]))
        for history, saved in zip(self._histories, extra["recent"], strict=True):
            history.load_state_dict(saved)
        self.skipped = list(extra["skipped"])
        self._measured = [(name, norm_type) for name, norm_type in extra.get("measured", [])]  # not in earlier versions

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_clipping": None, "_measurements": {}}


def _scalar(value: Tensor | float | None, unknown: Tensor) -> Tensor:
    """Return a value as a scalar with the device and dtype of ``unknown``, which stands for ``None``."""
    if value is None:
        return unknown
    return value.to(unknown) if isinstance(value, Tensor) else _constant(float(value), unknown.device, unknown.dtype)


@functools.lru_cache(maxsize=64)
def _constant(value: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a number on the device, where it is written once and not in each step."""
    return torch.full((), value, device=device, dtype=dtype)


def _copies(weights: list[Tensor]) -> list[Tensor]:
    ours = shards.local_shards(weight.detach() for weight in weights)
    copies = [torch.empty_like(shard) for shard in ours]
    torch._foreach_copy_(copies, ours)
    return [shards.placed_as(copy, weight) for copy, weight in zip(copies, weights, strict=True)]


def _percentile(norms: Norms, percentile: float) -> float:
    finite = norms.before[norms.before.isfinite()].double()
    if not len(finite):
        raise RuntimeError("The history holds no finite norm yet: train some steps first.")
    return float(torch.quantile(finite, percentile / 100.0))


def _ordinal(number: float) -> str:
    is_teen = number % 100 in (11, 12, 13)
    suffix = next((text for digit, text in ((1, "st"), (2, "nd"), (3, "rd")) if number % 10 == digit), "th")
    return f"{number:g}{'th' if is_teen else suffix}"


def _norms_by_label(labels: list[str], each: Tensor, norm_type: float) -> dict[str, Tensor]:
    """Return the norm of all tensors with the same label, from the norms of the single tensors."""
    grouped: dict[str, list[Tensor]] = {}
    for label, norm in zip(labels, each.unbind(), strict=True):
        grouped.setdefault(label, []).append(norm)
    return {label: torch.linalg.vector_norm(torch.stack(own), norm_type) for label, own in grouped.items()}


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    # Weights of zero have no ratio. A large number, unlike infinity, does not break the axis of a plot.
    return part / whole.clamp(min=1e-12)
