"""Gradient clipping, and dropping steps whose gradients cannot be used, as a callback."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.base import shards, sparse
from lightning_optim.base.arguments import check_number
from lightning_optim.base.policy import PerOptimizer
from lightning_optim.base.selection import Selection
from lightning_optim.gradients.attempts import Attempts
from lightning_optim.gradients.clipping.by_norm import ClipByNorm
from lightning_optim.gradients.clipping.clipping import Clipping, Scope
from lightning_optim.gradients.step_skipping import Guard, Verdict
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import LightningModule, Trainer, rank_zero_info
from lightning_optim.runtime.lightning.precision import agree_on_overflow, scale_of
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.refusals import refuse_split_units
from lightning_optim.runtime.step import OptimizerStep, drop_step

NonFinite = Literal["skip", "raise", "ignore"]

_PLACES = 1000  # Skipped batches that are remembered.


class GradientClipping(OptimCallback):
    """Clip the gradients of each optimizer before its step, and drop a step whose gradients are not finite.

    It acts after accumulation and penalties, on gradients that are whole, averaged over ranks and unscaled: under
    automatic and manual optimization (where Lightning's ``clip_gradients`` clips scaled gradients with mixed
    precision), with a fused optimizer under a GradScaler (which Lightning refuses), and for models that mix DTensors
    with plain parameters whose gradients agree on all ranks. Each optimizer's gradients have their own norm.

    A skipped step leaves weights, momentum and step counts as they are, on all ranks alike, and is no step for any
    callback here. It is logged with the index of its batch, and counted in ``skipped``. With a GradScaler, which skips
    by itself while it searches its scale, its skips are counted too, each once; an infinity is no error as long as a
    smaller scale may cure it.

    The norm before clipping is logged as ``gradients/norm`` at the steps at which Lightning logs, and the number of
    skipped steps, once there are any, as ``gradients/skipped``. ``nonfinite="skip"`` and ``spike`` need one read from
    the device in each step, and one reduction if there are several ranks; ``"ignore"`` without ``spike`` needs none.
    What is read is the norm: where :class:`ClipByNorm` has nothing to do then, the gradients are not touched.

    Args:
        policy: What is done: one policy; a list, which runs in turn; or a number, short for ``ClipByNorm(number)``.
        nonfinite: What to do when the norm is NaN or infinite: ``"skip"`` the step; ``"raise"`` a ``RuntimeError`` that
            names the parameters; ``"ignore"``, which lets one NaN into every weight. Default ``"skip"``, since no
            training goes on from weights of NaN.
        max_consecutive_skips: How many steps in a row may be skipped, >= 0; one more raises. Default 10: then it is the
            weights or the data, and not one batch.
        spike: If given, a factor > 1: a step whose norm is more than so many times the median of the last 100 is
            skipped too, once there are 10.
        name: Tells two callbacks apart in checkpoints.

    Attributes:
        skipped: The steps of each optimizer that were skipped, in the order of ``trainer.optimizers``.
        skipped_at: Where the last 1000 of them were: number of the optimizer, epoch, index of the batch.

    Raises:
        ValueError: If an argument is none of these.
        RuntimeError: In training, as ``nonfinite`` and ``max_consecutive_skips`` say.

    Example::

        >>> from lightning_optim import ClipByValue, GradientClipping
        >>> GradientClipping(1.0).policies
        [ClipByNorm(max_norm=1.0)]
        >>> GradientClipping([ClipByValue(0.5), ClipByNorm(1.0)]).policies
        [ClipByValue(value=0.5), ClipByNorm(max_norm=1.0)]
    """

    slot = Slot.CLIP
    touches = frozenset({"gradients"})

    def __init__(
        self,
        policy: float | Clipping | list[Clipping],
        nonfinite: NonFinite = "skip",
        max_consecutive_skips: int = 10,
        spike: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        listed = policy if isinstance(policy, list | tuple) else [policy]
        self.policies = [one if isinstance(one, Clipping) else _from_number(one) for one in listed]
        if not self.policies:
            raise ValueError(f"`policy={policy!r}` must be a number > 0, a clipping policy or a list of them")
        if nonfinite not in get_args(NonFinite):
            raise ValueError(f"`nonfinite={nonfinite!r}` must be one of {get_args(NonFinite)}")
        check_number("max_consecutive_skips", max_consecutive_skips, low=0, integer=True)
        if spike is not None:
            check_number("spike", spike, low=1.0, low_open=True)
        self.nonfinite, self.max_consecutive_skips, self.spike = nonfinite, max_consecutive_skips, spike
        self.reset()

    @property
    def identity(self) -> dict[str, Any]:
        return {"policy": [policy.identity for policy in self.policies]}

    @property
    def needs_total(self) -> bool:
        return any(policy.scheduled for policy in self.policies)

    def reset(self) -> None:
        self._copies = PerOptimizer(self.policies)
        self._chosen: list[Selection | None] = []
        self._acted: dict[int, list[Clipping]] = {}
        self._attempts = Attempts()
        self._guards: list[Guard] = []
        self._batch_idx = 0
        self.skipped: list[int] = []
        self.skipped_at: list[list[int]] = []
        self._in_a_row: list[int] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        shards.reshard_(pl_module)
        for policy in self.policies:
            refuse_split_units(policy, pl_module.parameters())
            if policy.on is None and policy.exclude is None:
                self._chosen.append(None)
            else:
                on = "*" if policy.on is None else policy.on
                self._chosen.append(Selection(pl_module, on, policy.exclude))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._extend(len(trainer.optimizers))

    def _extend(self, optimizers: int) -> None:
        missing = optimizers - len(self._guards)
        self._guards += [Guard(self.nonfinite != "ignore", self.spike) for _ in range(missing)]
        self.skipped += [0] * missing
        self._in_a_row += [0] * missing

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_idx = batch_idx

    # ---- before the step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        if not step.grads:
            return
        norm_type = self.policies[0].norm_type
        checks = self.nonfinite != "ignore" or self.spike is not None
        norm = step.norm(norm_type) if checks or step.logs else step.known_norm(norm_type)
        verdict: Verdict = "fine"
        value: float | None = None
        if checks and norm is not None:
            verdict, value = self._guards[step.index].judge(norm, trainer.world_size)
        if verdict == "fine" or value is None:
            self._attempts.tried(step.index)
            self._clip_(step, norm, value)
        else:
            self._drop(trainer, step, verdict, value)
        if step.logs and norm is not None:
            self.log_value(pl_module, "gradients/norm", norm, optimizer)
            if self.skipped[step.index]:
                self.log_value(pl_module, "gradients/skipped", float(self.skipped[step.index]), optimizer)

    def _clip_(self, step: OptimizerStep, norm: Tensor | None, value: float | None) -> None:
        """Apply the policies; ``norm`` is that of all gradients, and ``value`` the same on the host, where known."""
        acted = self._acted[step.index] = []
        norm_type, weights, grads = self.policies[0].norm_type, step.weights, step.grads
        when: dict[str, Any] = {"step": step.number, "total": step.total}
        for policy, selection in zip(self._copies[step.index], self._chosen, strict=True):
            if value is not None and policy.norm_type == norm_type and policy.is_idle(value, **when):
                continue
            some_weights, some_grads, chosen = weights, grads, None
            if selection is not None:
                selection.follow(weights)
                chosen = selection.ids
                pairs = [(w, g) for w, g in zip(weights, grads, strict=True) if id(w) in chosen]
                some_weights, some_grads = [w for w, _ in pairs], [g for _, g in pairs]
            if some_grads:
                known = norm if chosen is None and policy.norm_type == norm_type else None
                units: dict[
                    str, Any
                ] = {}  # Only a policy that asks for them must take them: users' own may know nothing of units.
                if policy.scope != "global":
                    units["units"] = _units(policy.scope, step, chosen, some_weights)
                some_weights, some_grads = sparse.dense_rows(some_weights, some_grads)
                policy.clip_(some_grads, some_weights, norm=known, **when, **units)
                acted.append(policy)
                norm = value = None  # of the gradients before; the next policy sees others

    def clipped(self, index: int) -> Tensor | bool | None:
        """Whether the last step of an optimizer was clipped, on its device; ``None`` if a policy does not say."""
        if not any(policy.limits for policy in self.policies):
            return None
        said = [policy.clipped for policy in self._acted.get(index, []) if policy.limits]
        flags = [flag for flag in said if flag is not None]
        if len(flags) < len(said):
            return None
        return torch.stack(flags).any() if flags else False

    # ---- skipped steps -----------------------------------------------------------------------------------------------

    def _drop(self, trainer: Trainer, step: OptimizerStep, verdict: Verdict, value: float) -> None:
        optimizer, index = step.optimizer, step.index
        where = f"in epoch {trainer.current_epoch}, batch {self._batch_idx} the norm of its gradients is {value:.4g}"
        curable = verdict == "nonfinite" and scale_of(trainer) > 1.0  # by a smaller scale
        if not curable:
            self._in_a_row[index] += 1
            row = self._in_a_row[index]
            if verdict == "nonfinite" and self.nonfinite == "raise":
                raise RuntimeError(f"{type(optimizer).__name__}: {where}. {_not_finite(step)}")
            if row > self.max_consecutive_skips:
                raise RuntimeError(
                    f"{row} steps in a row of {type(optimizer).__name__} would be skipped, more than"
                    f" `max_consecutive_skips={self.max_consecutive_skips}`: {where}."
                    f" {_not_finite(step)}"
                )
        if verdict == "nonfinite":
            agree_on_overflow(trainer, optimizer, overflow=curable)
        drop_step(trainer, optimizer, where)
        self._count(trainer, index)

    def _count(self, trainer: Trainer, index: int) -> None:
        self.skipped[index] += 1
        self.skipped_at = [*self.skipped_at[1 - _PLACES :], [index, trainer.current_epoch, self._batch_idx]]

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        index = self.current_step(optimizer).index
        self._attempts.happened(index)
        self._in_a_row[index] = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # What was clipped and did not happen was skipped by the scaler: with "ignore", and for a norm that is finite
        # although one scaled gradient was not.
        for index, count in self._attempts.failed().items():
            rank_zero_info(f"The scaler skipped the step in epoch {trainer.current_epoch}, batch {batch_idx}.")
            for _ in range(count):
                self._count(trainer, index)

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return {
            "policies": self._copies.state_dict(),
            "guards": [guard.state_dict() for guard in self._guards],
            "skipped": list(self.skipped),
            "skipped_at": [list(place) for place in self.skipped_at],
            "in_a_row": list(self._in_a_row),
        }

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._copies.load_state_dict(extra["policies"])
        self._extend(len(extra["guards"]))
        for guard, saved in zip(self._guards, extra["guards"], strict=True):
            guard.load_state_dict(saved)
        self.skipped, self._in_a_row = list(extra["skipped"]), list(extra["in_a_row"])
        self.skipped_at = [list(place) for place in extra["skipped_at"]]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_chosen": []}


def _from_number(number: Any) -> Clipping:
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= math.inf:
        raise ValueError(f"`policy={number!r}` must be a number > 0, a clipping policy or a list of them")
    return ClipByNorm(float(number))


def _units(scope: Scope, step: OptimizerStep, chosen: set[int] | None, weights: list[Tensor]) -> list[int]:
    """The number of each weight's group, or its own among all that are chosen, whether they have a gradient or not."""
    grouped = [(id(parameter), number) for number, group in enumerate(step.groups) for parameter in group]
    listed = [(key, number) for key, number in grouped if chosen is None or key in chosen]
    unit_of = {key: own if scope == "tensor" else number for own, (key, number) in enumerate(listed)}
    return [unit_of[id(weight)] for weight in weights]


def _not_finite(step: OptimizerStep) -> str:
    """A sentence with the parameters whose gradients, or their parts on this rank, are not finite, if any are."""
    named = zip(step.names, shards.local_shards(sparse.dense_rows(step.weights, step.grads)[1]), strict=True)
    found = [name for name, grad in named if not bool(grad.isfinite().all())]
    return f"On this rank not finite are the gradients of {found}." if found else "On this rank all are finite."
