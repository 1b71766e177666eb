"""Norms of gradients and of updates, measured and shown."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.base import shards, sparse
from lightning_optim.base.arguments import check_number
from lightning_optim.base.norms import tensor_norms, total_norm
from lightning_optim.base.ring_buffer import Ring
from lightning_optim.gradients.attempts import Attempts
from lightning_optim.gradients.gradient_clipping import GradientClipping
from lightning_optim.plotting import canvas
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import LightningModule, Trainer
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.step import OptimizerStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Level = Literal["total", "module", "parameter"]

_BEFORE, _AFTER, _UPDATE, _CLIPPED = range(4)  # The columns of what is remembered of a step.


@dataclass
class _Measured:
    """Measurements of one optimizer's step, and what the rest of them needs."""

    norm: Tensor
    logs: bool
    weights: list[Tensor] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)


class GradientMonitor(OptimCallback):
    r"""Measure gradients before and after clipping, and how far a step moves the weights.

    At the steps at which Lightning logs (``log_every_n_steps``), for all weights of an optimizer together:

    * ``gradients/norm`` and ``gradients/norm_clipped``: before and after clipping, whole and unscaled;
    * ``gradients/update_ratio``: :math:`\lVert \Delta w \rVert / \lVert w \rVert` of the step. About 1e-3 is usual;
      below 1e-5 a layer hardly learns, above 1e-2 it is shaken;
    * ``gradients/share_clipped``: the share of the remembered steps that clipping made shorter;
    * ``gradients/skipped``: the steps so far that had gradients and did not happen.

    With ``level="module"`` or ``"parameter"`` the first three also for each module that holds parameters itself, or for
    each parameter, as ``gradients/norm/encoder.0`` and so on.

    The norm of each step is kept, on its device, so that :meth:`suggest_clip` and :meth:`plot` see all steps and not
    only those that were logged. Clipping uses the same norm, and measures in the same way: the norm is that of its
    first policy (``norm_type``), 2 without clipping. A step that is not logged costs what one norm costs, and nothing
    beside clipping by norm; nothing waits for the device. In a step that is logged ``update_ratio`` needs a copy of
    the weights.

    Whether a step was clipped is known for policies that scale by a norm; for others it is seen in logged steps, from
    the norms.

    Args:
        level: For what the norms are logged: ``"total"``; ``"module"`` or ``"parameter"`` as well, which floods a
            logger if the model is large.
        history: How many steps of each optimizer are remembered, >= 1. Default 1000, a few kB.
        name: Tells two callbacks apart in checkpoints.

    Attributes:
        skipped: The steps of each optimizer that had gradients and did not happen: not finite, dropped, or skipped by a
            scaler.

    Raises:
        ValueError: If an argument is none of these.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_optim import GradientClipping, GradientMonitor
        >>> monitor = GradientMonitor()
        >>> trainer = Trainer(max_steps=20, callbacks=[monitor, GradientClipping(1.0)], barebones=True)
        >>> trainer.fit(BoringModel())
        >>> 0.0 < monitor.suggest_clip(percentile=50.0) < monitor.suggest_clip(percentile=90.0)
        True
    """

    slot = Slot.MEASURE
    touches = frozenset({"gradients"})

    def __init__(self, level: Level = "total", history: int = 1000, name: str | None = None) -> None:
        super().__init__(name)
        if level not in get_args(Level):
            raise ValueError(f"`level={level!r}` must be one of {get_args(Level)}")
        check_number("history", history, low=1, integer=True)
        self.level, self.history = level, history
        self.reset()

    def reset(self) -> None:
        self._recent: list[Ring] = []
        self._steps: dict[int, _Measured] = {}
        self._attempts = Attempts()
        self._clipping: GradientClipping | None = None
        self.skipped: list[int] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        found = (cb for cb in trainer.callbacks if isinstance(cb, GradientClipping))
        self._clipping = next(found, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._extend(len(trainer.optimizers))

    def _extend(self, optimizers: int) -> None:
        missing = optimizers - len(self._recent)
        self._recent += [Ring(self.history) for _ in range(missing)]
        self.skipped += [0] * missing

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        if not step.grads:
            return
        self._attempts.tried(step.index)
        self._steps[step.index] = measured = _Measured(step.norm(self._norm_type), step.logs)
        if step.logs:
            measured.weights, measured.copies = step.weights, _copies(step.weights)
            measured.labels = self._labels(step)
            measured.values |= {"gradients/norm": measured.norm, **self._detailed("gradients/norm", step)}

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        self._attempts.happened(step.index)
        measured = self._steps.get(step.index)
        if measured is None:
            return
        nothing = torch.full_like(measured.norm, math.nan)
        row = [measured.norm, nothing, nothing, nothing]
        clipped = None if self._clipping is None else self._clipping.clipped(step.index)
        if clipped is not None:
            row[_CLIPPED] = clipped.to(nothing) if isinstance(clipped, Tensor) else nothing.new_full((), clipped)
        if measured.logs:
            row[_AFTER] = step.norm(self._norm_type)
            row[_UPDATE] = self._measure_update(measured)
            if row[_CLIPPED] is nothing and self._only_limits:
                row[_CLIPPED] = (row[_AFTER] < measured.norm).to(measured.norm)
            measured.values |= {"gradients/norm_clipped": row[_AFTER], "gradients/update_ratio": row[_UPDATE]}
            measured.values |= self._detailed("gradients/norm_clipped", step)
        self._recent[step.index].append(torch.stack(row))
        if measured.logs and row[_CLIPPED] is not nothing:
            measured.values["gradients/share_clipped"] = self._recent[step.index].rows[:, _CLIPPED].nanmean()

    def _measure_update(self, measured: _Measured) -> Tensor:
        weights, copies = measured.weights, measured.copies
        before, sizes = total_norm(copies), tensor_norms(copies) if self.level != "total" else None
        torch._foreach_sub_(shards.local_shards(copies), shards.local_shards([weight.detach() for weight in weights]))
        if sizes is not None:
            moved = _by_name(measured.labels, tensor_norms(copies), 2.0)
            held = _by_name(measured.labels, sizes, 2.0)
            measured.values |= {f"gradients/update_ratio/{name}": _ratio(moved[name], held[name]) for name in moved}
        ratio = _ratio(total_norm(copies), before)
        measured.weights, measured.copies = [], []
        return ratio

    def _detailed(self, prefix: str, step: OptimizerStep) -> dict[str, Tensor]:
        if self.level == "total":
            return {}
        each = tensor_norms(sparse.dense_rows(step.weights, step.grads)[1], self._norm_type)
        found = _by_name(self._labels(step), each, self._norm_type)
        return {f"{prefix}/{name}": norm for name, norm in found.items()}

    def _labels(self, step: OptimizerStep) -> list[str]:
        """Return under which name the norm of each weight is logged."""
        if self.level == "total":
            return []
        return [name.rpartition(".")[0] or "root" for name in step.names] if self.level == "module" else step.names

    @property
    def _norm_type(self) -> float:
        return 2.0 if self._clipping is None else self._clipping.policies[0].norm_type

    @property
    def _only_limits(self) -> bool:
        """Whether a norm that became smaller was clipped, and is not smaller for another reason."""
        return self._clipping is not None and all(policy.limits for policy in self._clipping.policies)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for index, count in self._attempts.failed().items():
            self.skipped[index] += count
        for index, step in self._steps.items():
            if step.logs:
                values: dict[str, Tensor | float] = {**step.values, "gradients/skipped": float(self.skipped[index])}
                for name, value in values.items():
                    self.log_value(pl_module, name, value, trainer.optimizers[index])
        self._steps.clear()

    # ---- reading -----------------------------------------------------------------------------------------------------

    def suggest_clip(self, percentile: float = 90.0, optimizer: int = 0) -> float:
        """A threshold for clipping by norm: a percentile of the remembered norms before clipping.

        Train some hundred steps without clipping, or with what you have. At the 90th percentile one step in ten is
        clipped: enough against spikes, and little else. If half the steps are clipped, the threshold acts as a
        learning rate.

        Args:
            percentile: In [0, 100].
            optimizer: The number of the optimizer.

        Raises:
            ValueError: If ``percentile`` is out of its range.
            RuntimeError: If no step with a finite norm was measured yet.
        """
        check_number("percentile", percentile, low=0.0, high=100.0)
        norms = self._remembered(optimizer)[:, _BEFORE].double()
        norms = norms[norms.isfinite()]
        if not len(norms):
            raise RuntimeError("No norm is remembered that is finite: train some steps first")
        return float(torch.quantile(norms, percentile / 100.0))

    def plot(self, optimizer: int = 0, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the remembered norms before and after clipping, and the suggested threshold, over the steps.

        Args:
            optimizer: The number of the optimizer.
            ax: Where to draw; a new figure without it.

        Returns:
            The figure and its axes.
        """
        rows = self._remembered(optimizer)
        last = self.steps[optimizer] if optimizer < len(self.steps) else len(rows)
        steps = torch.arange(last - len(rows) + 1, last + 1)
        figure, axes = canvas(ax)
        axes.plot(steps, rows[:, _BEFORE], linewidth=0.8, label="before clipping")
        seen = rows[:, _AFTER].isfinite()
        if rows[:, _CLIPPED].isfinite().any():
            axes.plot(steps[seen], rows[seen, _AFTER], ".", label="after clipping (logged steps)")
        threshold = self.suggest_clip(optimizer=optimizer)
        axes.axhline(threshold, color="gray", linestyle="--", label=f"90th percentile, {threshold:.3g}")
        axes.set(xlabel="optimizer step", ylabel="norm of the gradients", yscale="log")
        axes.legend()
        return figure, axes

    def _remembered(self, optimizer: int) -> Tensor:
        rows = self._recent[optimizer].rows if optimizer < len(self._recent) else torch.zeros(0, 4)
        return rows.cpu() if rows.numel() else torch.zeros(0, 4)

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return {"recent": [recent.state_dict() for recent in self._recent], "skipped": list(self.skipped)}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._extend(len(extra["recent"]))
        for recent, saved in zip(self._recent, extra["recent"], strict=True):
            recent.load_state_dict(saved)
        self.skipped = list(extra["skipped"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_clipping": None, "_steps": {}}


def _copies(weights: list[Tensor]) -> list[Tensor]:
    ours = shards.local_shards(weight.detach() for weight in weights)
    copies = [torch.empty_like(shard) for shard in ours]
    torch._foreach_copy_(copies, ours)
    return [shards.placed_as(copy, weight) for copy, weight in zip(copies, weights, strict=True)]


def _by_name(labels: list[str], each: Tensor, norm_type: float) -> dict[str, Tensor]:
    """The norm of all tensors under each label, of the tensors' norms."""
    grouped: dict[str, list[Tensor]] = {}
    for label, norm in zip(labels, each.unbind(), strict=True):
        grouped.setdefault(label, []).append(norm)
    return {label: torch.linalg.vector_norm(torch.stack(own), norm_type) for label, own in grouped.items()}


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    # Weights of zero have no ratio: a number that is merely large keeps a logger's axis, infinity does not.
    return part / whole.clamp(min=1e-12)
