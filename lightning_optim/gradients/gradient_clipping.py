"""Gradient clipping, as a callback."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_optim import tensors
from lightning_optim.callback import OptimCallback, gradients
from lightning_optim.gradients.clipping import ClipByNorm, Clipping
from lightning_optim.policy import PerOptimizer
from lightning_optim.refusals import refuse_parts
from lightning_optim.slots import Slot


class GradientClipping(OptimCallback):
    """Clip the gradients of each optimizer before its step.

    It acts after accumulation and penalties, on gradients that are whole, averaged over ranks and unscaled: under
    automatic and manual optimization (where Lightning's ``clip_gradients`` clips scaled gradients with mixed
    precision), with a fused optimizer under a GradScaler (which Lightning refuses), and for models that mix DTensors
    with plain parameters whose gradients agree on all ranks. Each optimizer's gradients have their own norm.

    The norm before clipping is logged as ``gradients/norm`` at the steps at which Lightning logs.

    Args:
        policy: What is done: one policy; a list, which runs in turn; or a number, short for ``ClipByNorm(number)``.
        name: Tells two callbacks apart in checkpoints.

    Raises:
        ValueError: If ``policy`` is none of these.

    Example::

        >>> from lightning_optim import ClipByValue, GradientClipping
        >>> GradientClipping(1.0).policies
        [ClipByNorm(max_norm=1.0)]
        >>> GradientClipping([ClipByValue(0.5), ClipByNorm(1.0)]).policies
        [ClipByValue(value=0.5), ClipByNorm(max_norm=1.0)]
    """

    slot = Slot.CLIP
    touches = frozenset({"gradients"})

    def __init__(self, policy: float | Clipping | list[Clipping], name: str | None = None) -> None:
        super().__init__(name)
        listed = policy if isinstance(policy, list | tuple) else [policy]
        self.policies = [one if isinstance(one, Clipping) else _from_number(one) for one in listed]
        if not self.policies:
            raise ValueError(f"`policy={policy!r}` must be a number > 0, a clipping policy or a list of them")
        self.reset()

    @property
    def identity(self) -> dict[str, Any]:
        return {"policy": [policy.identity for policy in self.policies]}

    @property
    def needs_total(self) -> bool:
        return any(policy.scheduled for policy in self.policies)

    def reset(self) -> None:
        self._copies = PerOptimizer(self.policies)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        for policy in self.policies:
            refuse_parts(policy, pl_module.parameters())

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        weights, grads = gradients(optimizer)
        if not grads:
            return
        index = trainer.optimizers.index(optimizer)
        policies = self._copies[index]
        norm = None
        if self.logs_now(trainer):
            norm = tensors.total_norm(grads, policies[0].norm_type)
            self.log_value(pl_module, "gradients/norm", norm, optimizer)
        for policy in policies:
            policy.clip_(grads, weights, norm=norm, step=self.steps[index], total=self._running.total)
            norm = None  # of the gradients before; the next policy sees others

    def extra_state(self) -> dict[str, Any]:
        return {"policies": self._copies.state_dict()}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._copies.load_state_dict(extra["policies"])


def _from_number(number: Any) -> Clipping:
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= math.inf:
        raise ValueError(f"`policy={number!r}` must be a number > 0, a clipping policy or a list of them")
    return ClipByNorm(float(number))
