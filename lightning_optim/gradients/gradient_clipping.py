"""Clip the gradients before each optimizer step, and skip steps whose gradients are not finite."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.base.policy import PerOptimizer
from lightning_optim.gradients.clipped_steps import ClippedSteps
from lightning_optim.gradients.clipping.clipping_policy import Clipping, Scope
from lightning_optim.gradients.clipping_plan import Bounds, Chosen, Part, check_optimizers, parts_of
from lightning_optim.gradients.module_clipping import watch_clipping
from lightning_optim.gradients.step_skipping import NormCheck, Reason, SkippedSteps
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import (
    LightningModule,
    LightningOptimizer,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_optim.runtime.lightning.precision import agree_on_overflow, scale_of
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.refusals import refuse_looked_up_rows, refuse_split_units
from lightning_optim.runtime.step import OptimizerStep, drop_step, parameters_of

OnNonFinite: TypeAlias = Literal["skip", "raise", "ignore"]

_PLACES = 1000  # Number of skipped steps whose place is remembered.


class GradientClipping(OptimCallback):
    """Clip the gradients of each optimizer before its step, and skip a step whose gradients are not finite.

    It acts after accumulation and penalties, on gradients that are whole, averaged over ranks and unscaled: under
    automatic and manual optimization (where Lightning's ``clip_gradients`` clips scaled gradients in mixed precision),
    with a fused optimizer under a GradScaler (which Lightning refuses), and for models that mix DTensors with plain
    parameters whose gradients agree on all ranks. The norm is computed for each optimizer by itself.

    A skipped step leaves weights, momentum and step counts as they are, on all ranks alike, and no callback of this
    package counts it. Its reason is printed, with the index of its batch, and it is counted in ``skipped``. A
    GradScaler, which skips steps by itself until it has found its scale, has these counted too, each once. An infinite
    norm raises no error as long as a smaller scale may cure it.

    The norm before clipping is logged as ``gradients/norm`` at the steps at which Lightning logs, and the number of
    skipped steps as ``gradients/skipped`` once there are any.

    ``nonfinite="skip"`` and ``spike`` read one number from the device in each step, and reduce one over the ranks if
    there are several; ``"ignore"`` without ``spike`` reads nothing. That number is the norm: where it is within the
    bound of :class:`ClipByNorm`, the gradients are not touched.

    Args:
        policy: The clipping policy; a list of policies, which act in turn; or a number, short for
            ``ClipByNorm(number)``. Or a dictionary of these: by patterns over parameter names, such as
            ``{"encoder.*": 1.0, "head.*": 0.1, "*": 0.5}``, or by indices of optimizers, such as
            ``{0: 1.0, 1: ZClip()}``. Of several patterns the first that matches a parameter wins, and each has a norm
            of its own, over its parameters alone. Parameters that no pattern matches, and optimizers without an entry,
            are not clipped; a step whose gradients are not finite is skipped for them too.
        nonfinite: Action if the norm is NaN or infinite: ``"skip"`` the step; ``"raise"`` a ``RuntimeError`` that names
            the parameters; or ``"ignore"`` it, so that one NaN reaches every weight. Default ``"skip"``, because
            no training recovers from weights that are NaN.
        max_consecutive_skips: Number of steps in a row that may be skipped, >= 0; one more raises. Default 10: then
            the weights or the data are at fault, and not a single batch.
        spike: A factor > 1: a step whose norm is more than this factor times the median of the last 100 norms is
            skipped too, once there are 10. Default ``None``: no such check.
        name: Distinguishes two such callbacks in checkpoints.
        summary: See :class:`OptimCallback`.

    Attributes:
        skipped: Number of skipped steps of each optimizer, in the order of ``trainer.optimizers``.
        skipped_at: Places of the last 1000 skipped steps: index of the optimizer, epoch, index of the batch.

    Raises:
        ValueError: If an argument is out of its range; or, before the first step, if a pattern matches no parameter.
        MisconfigurationException: Before the first step, if there is no optimizer with one of the indices.
        RuntimeError: During training, as ``nonfinite`` and ``max_consecutive_skips`` say.

    Example::

        >>> from lightning_optim import ClipByNorm, ClipByValue, GradientClipping
        >>> GradientClipping(1.0).policies
        [ClipByNorm(1.0)]
        >>> GradientClipping([ClipByValue(0.5), ClipByNorm(1.0)]).policies
        [ClipByValue(0.5), ClipByNorm(1.0)]
        >>> GradientClipping({"head.*": 0.1, "*": [ClipByValue(0.5), 1.0]}).policies
        [ClipByNorm(0.1), ClipByValue(0.5), ClipByNorm(1.0)]

    For a Trainer: ``Trainer(callbacks=[GradientClipping(1.0)])``.
    """

    slot = Slot.CLIP
    touches = frozenset({"gradients"})

    def __init__(
        self,
        policy: Bounds | Mapping[int, Bounds] | Mapping[str, Bounds],
        nonfinite: OnNonFinite = "skip",
        max_consecutive_skips: int = 10,
        spike: float | None = None,
        name: str | None = None,
        summary: bool = True,
    ) -> None:
        super().__init__(name, summary)
        self.policy = policy
        self._parts = parts_of(policy)
        self.policies = [part.policy for part in self._parts]
        self.nonfinite = check_choice("nonfinite", nonfinite, OnNonFinite)
        self.max_consecutive_skips = check_number("max_consecutive_skips", max_consecutive_skips, low=0, integer=True)
        self.spike = spike if spike is None else check_number("spike", spike, low=1.0, low_open=True)
        self.reset()

    @property
    def identity(self) -> dict[str, Any]:
        if not isinstance(self.policy, Mapping):
            return {"policy": [policy.identity for policy in self.policies]}
        named: dict[str | int | None, list[str]] = {}
        for part in self._parts:
            named.setdefault(part.pattern if part.optimizer is None else part.optimizer, []).append(
                part.policy.identity
            )
        return {"policy": named}

    @property
    def needs_total(self) -> bool:
        return any(policy.scheduled for policy in self.policies)

    def reset(self) -> None:
        self._copies = PerOptimizer(self.policies)
        self._chosen: list[Chosen | None] = []
        self._applied: dict[int, list[Clipping]] = {}
        self._pending = SkippedSteps()
        self._checks: list[NormCheck] = []
        self._batch_idx = 0
        self._warned_of_module = False
        self.skipped: list[int] = []
        self.skipped_at: list[list[int]] = []
        self._skipped_in_a_row: list[int] = []
        self._clipped: list[ClippedSteps] = []

    def describe_step(self, index: int) -> tuple[str, str]:
        words = [
            part.policy.in_words + ("" if part.pattern is None else f" on {part.pattern}")
            for part in self._parts
            if part.acts_on(index)
        ]
        is_by_pattern = any(part.pattern is not None for part in self._parts)
        return (", " if is_by_pattern else " → ").join(words), ""

    def report(self) -> str:
        # `skipped` is empty if the run ended before its first step.
        return "; ".join(filter(None, map(self._report_of, range(len(self.skipped)))))

    def _report_of(self, index: int) -> str:
        taken, skipped = self.steps[index], self.skipped[index]
        clipped, seen = self._clipped[index].state()
        share = f"{100 * clipped / seen:.0f} %" if seen else ""
        if self.nonfinite == "ignore" and self.spike is None:
            words = f"{share} of {seen:,} steps clipped" if share else ""
        else:
            words = f"{skipped:,} of {taken + skipped:,} steps skipped" + (f", {share} clipped" if share else "")
        return f"optimizer {index}: {words}" if words and len(self.steps) > 1 else words

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        shards.reshard_(pl_module)
        self._copies.name_weights(pl_module)
        check_optimizers(self._parts, trainer)
        for part in self._parts:
            chosen = part.choose(pl_module)
            index = part.optimizer
            candidates = pl_module.parameters() if index is None else parameters_of(trainer.optimizers[index])
            refuse_split_units(part.policy, [p for p in candidates if chosen is None or id(p) in chosen.ids])
            self._chosen.append(chosen)
        watch_clipping(self.session, trainer, pl_module, self._warn_of_module)

    def _warn_of_module(self, optimizer: Optimizer | LightningOptimizer, does: str) -> bool:
        """Warn once that the module clips too, if a policy clips gradients of the same optimizer; True if warned."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if self._warned_of_module or self.fit is None or plain not in self.fit.trainer.optimizers:
            return self._warned_of_module
        step = self.current_step(plain)
        if not any(map(functools.partial(_limits, step), self._parts, self._chosen)):
            return False
        self._warned_of_module = True
        ours, module = type(self).__name__, type(self.fit.trainer.lightning_module).__name__
        rank_zero_warn(
            f"{module} {does}, and {ours} clips them too. To clip once, turn off the clipping of {module} by an"
            f" argument or a setting of its own; or write `{ours}(float('inf'))`, which does not clip, and skips steps"
            " that are not finite."
        )
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._extend(len(trainer.optimizers))

    def _extend(self, optimizers: int) -> None:
        missing = optimizers - len(self._checks)
        self._checks += [NormCheck(self.nonfinite != "ignore", self.spike) for _ in range(missing)]
        self.skipped += [0] * missing
        self._skipped_in_a_row += [0] * missing
        self._clipped += [ClippedSteps() for _ in range(missing)]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_idx = batch_idx

    # ---- before the step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        if not step.grads:
            return
        norm_type = self.norm_type_of(step.index)
        checks = self.nonfinite != "ignore" or self.spike is not None
        norm = step.norm(norm_type) if checks or step.logs else step.known_norm(norm_type)
        # First of all, so that no policy takes the norm of a step that is skipped into its statistics.
        reason: Reason | None = None
        value: float | None = None
        if checks and norm is not None:
            reason, value = self._checks[step.index].check(norm, trainer.world_size)
        if reason is None or value is None:
            self._pending.before_step(step.index)
            self._clip_(step, norm, value)
        else:
            self._skip(trainer, step, reason, value)
        if step.logs and norm is not None:
            self.log_value(pl_module, "gradients/norm", norm, optimizer)
            if self.skipped[step.index]:
                self.log_value(pl_module, "gradients/skipped", float(self.skipped[step.index]), optimizer)

    def _clip_(self, step: OptimizerStep, norm: Tensor | None, value: float | None) -> None:
        """Apply the policies in turn.

        Args:
            step: The step.
            norm: The norm of all gradients, if it is known.
            value: The same on the host, if it is known there.
        """
        applied = self._applied[step.index] = []
        norm_type = self.norm_type_of(step.index)
        when: dict[str, Any] = {"step": step.number, "total": step.total}
        for part, policy, chosen in zip(self._parts, self._copies[step.index], self._chosen, strict=True):
            if not part.acts_on(step.index):
                continue
            if value is not None and policy.norm_type == norm_type and policy.is_idle(value, **when):
                continue
            weights, (rows, values), ids = step.weights, step.dense, None
            if chosen is not None:
                chosen.follow(step.parameters)
                ids = chosen.ids
                kept = [place for place, weight in enumerate(weights) if id(weight) in ids]
                weights, rows, values = ([tensors[place] for place in kept] for tensors in (weights, rows, values))
            if not values:
                continue
            refuse_looked_up_rows(policy, weights, rows)
            arguments = when | {"norm": norm if ids is None and policy.norm_type == norm_type else None}
            if policy.scope != "global":  # a policy without scopes need not take `units`
                arguments["units"] = _units(policy.scope, step, ids, weights)
            policy.clip_(values, rows, **arguments)
            applied.append(policy)
            norm = value = None  # the next policy sees other gradients

    def policies_of(self, index: int) -> list[Clipping]:
        """Return the policies that act on the gradients of the optimizer with this index."""
        return [part.policy for part in self._parts if part.acts_on(index)]

    def norm_type_of(self, index: int) -> float:
        """Return the exponent of the norm that is checked and logged for an optimizer: its first policy's, or 2."""
        return next((policy.norm_type for policy in self.policies_of(index)), 2.0)

    def clipped(self, index: int) -> Tensor | bool | None:
        """Return True if the last step of an optimizer was clipped; ``None`` if a policy cannot tell.

        Args:
            index: The index of the optimizer.

        Returns:
            A scalar on the device, or False if no policy had anything to do.
        """
        if not self._tells("clipped", index):
            return None
        flags = [policy.clipped for policy in self._applied.get(index, []) if policy.limits]
        known = [flag for flag in flags if flag is not None]
        if len(known) < len(flags):
            return None
        return torch.stack(known).any() if known else False

    def _tells(self, what: Literal["clipped", "factors"], index: int) -> bool:
        """Return True if something limits the gradients of an optimizer, and all that does tells whether it has.

        Otherwise only the steps in which such a policy had nothing to do would be known, and none of them is clipped.
        """
        limiting = [type(policy) for policy in self.policies_of(index) if policy.limits]
        return bool(limiting) and all(getattr(kind, what) is not getattr(Clipping, what) for kind in limiting)

    def bound_in_force(self, step: OptimizerStep) -> Tensor | float | None:
        """Return the bound on the norm of all gradients of a step, to be asked for after it; for plots.

        Returns:
            The smallest one of the policies that act on all gradients with the norm that is logged: a number, or a
            scalar on the device. ``None`` without such a policy, as where each pattern has a bound of its own.
        """
        norm_type, index = self.norm_type_of(step.index), step.index
        numbers: list[float] = []
        scalars: list[Tensor] = []
        for part, policy, chosen in zip(self._parts, self._copies[index], self._chosen, strict=True):
            if not part.acts_on(index) or policy.norm_type != norm_type:
                continue
            if chosen is None or chosen.ids.issuperset(map(id, step.weights)):
                bound = policy.bound_in_force(step=step.number, total=step.total)
                if bound is not None:
                    scalars.append(bound) if isinstance(bound, Tensor) else numbers.append(bound)
        if not scalars:
            return min(numbers, default=None)
        smallest = scalars[0] if len(scalars) == 1 else torch.stack(scalars).min()
        return smallest.clamp(max=min(numbers)) if numbers else smallest

    # ---- skipped steps -----------------------------------------------------------------------------------------------

    def _skip(self, trainer: Trainer, step: OptimizerStep, reason: Reason, norm: float) -> None:
        optimizer, index = step.optimizer, step.index
        where = f"in epoch {trainer.current_epoch}, batch {self._batch_idx} the norm of its gradients is {norm:.4g}"
        # A scale of 1 is not lowered further: the loss overflows by itself, and not because it is scaled.
        smaller_scale_may_help = reason == "nonfinite" and scale_of(trainer) > 1.0
        if not smaller_scale_may_help:
            self._skipped_in_a_row[index] += 1
            in_a_row = self._skipped_in_a_row[index]
            if reason == "nonfinite" and self.nonfinite == "raise":
                raise RuntimeError(f"{type(optimizer).__name__}: {where}. {_not_finite(step)}")
            if in_a_row > self.max_consecutive_skips:
                raise RuntimeError(
                    f"{in_a_row} steps in a row of {type(optimizer).__name__} would be skipped, more than"
                    f" `max_consecutive_skips={self.max_consecutive_skips}`: {where}. {_not_finite(step)}"
                )
        if reason == "nonfinite":
            agree_on_overflow(trainer, optimizer, overflow=smaller_scale_may_help)
        drop_step(trainer, optimizer, where)
        self._count_skipped(trainer, index)

    def _count_skipped(self, trainer: Trainer, index: int) -> None:
        self.skipped[index] += 1
        self.skipped_at = [*self.skipped_at[1 - _PLACES :], [index, trainer.current_epoch, self._batch_idx]]

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        index = self.current_step(optimizer).index
        self._pending.after_step(index)
        self._skipped_in_a_row[index] = 0
        if self._tells("factors", index):
            factors = [policy.factors for policy in self._applied.get(index, []) if policy.limits]
            known = [factor for factor in factors if factor is not None]
            if len(known) == len(factors):
                self._clipped[index].add(known)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Steps that were clipped but not taken, because the scaler skipped them: with "ignore", or if the norm is
        # finite although a scaled gradient was not.
        for index, count in self._pending.pop().items():
            rank_zero_info(f"The scaler skipped the step in epoch {trainer.current_epoch}, batch {batch_idx}.")
            for _ in range(count):
                self._count_skipped(trainer, index)

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return {
            "policies": self._copies.state_dict(),
            "guards": [check.state_dict() for check in self._checks],
            "skipped": list(self.skipped),
            "skipped_at": [list(place) for place in self.skipped_at],
            "in_a_row": list(self._skipped_in_a_row),
            "clipped": [list(steps.state()) for steps in self._clipped],
        }

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._copies.load_state_dict(extra["policies"])
        self._extend(len(extra["guards"]))
        for check, saved in zip(self._checks, extra["guards"], strict=True):
            check.load_state_dict(saved)
        self.skipped, self._skipped_in_a_row = list(extra["skipped"]), list(extra["in_a_row"])
        self.skipped_at = [list(place) for place in extra["skipped_at"]]
        for index, (clipped, seen) in enumerate(extra.get("clipped", [])):
            self._clipped[index] = ClippedSteps(clipped, seen)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_chosen": []}


def _units(scope: Scope, step: OptimizerStep, chosen: set[int] | None, weights: list[Tensor]) -> list[int]:
    """Return the index of each weight's group, or of the weight among all that are chosen, with a gradient or not."""
    grouped = [(id(parameter), number) for number, group in enumerate(step.groups) for parameter in group]
    listed = [(key, number) for key, number in grouped if chosen is None or key in chosen]
    unit_of = {key: own if scope == "tensor" else number for own, (key, number) in enumerate(listed)}
    return [unit_of[id(weight)] for weight in weights]


def _not_finite(step: OptimizerStep) -> str:
    """Return a sentence that names the parameters whose gradients on this rank are not finite."""
    named = zip(step.names, shards.local_shards(step.dense[1]), strict=True)
    found = [name for name, grad in named if not bool(grad.isfinite().all())]
    return f"On this rank the gradients of {found} are not finite." if found else "On this rank all are finite."


def _limits(step: OptimizerStep, part: Part, chosen: Chosen | None) -> bool:
    """Return True if a policy would make large gradients of this step smaller."""
    policy = part.policy
    if not policy.limits or not part.acts_on(step.index):
        return False
    if policy.is_idle(sys.float_info.max, step=step.number, total=step.total):
        return False
    return chosen is None or any(id(weight) in chosen.ids for weight in step.weights)
