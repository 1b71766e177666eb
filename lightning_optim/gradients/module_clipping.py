"""Notice what clips gradients beside GradientClipping: the module itself, or an argument of the Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from lightning_optim.base import shards
from lightning_optim.runtime.lightning import LightningModule, Trainer
from lightning_optim.runtime.lightning.modules import is_overridden
from lightning_optim.runtime.session import Session
from lightning_optim.runtime.step import parameters_of

Notice = Callable[[Optimizer, str], bool]


def bound_of_trainer(trainer: Trainer) -> float | None:
    """Return the bound on the 2-norm of all gradients by which Lightning clips, without :class:`GradientClipping`.

    Returns:
        The bound; NaN if gradients may be clipped in another way, by value or in the module's own
        ``configure_gradient_clipping``; ``None`` if nothing clips.
    """
    if is_overridden("configure_gradient_clipping", trainer.lightning_module):
        return math.nan
    if not trainer.gradient_clip_val:
        return None
    return float(trainer.gradient_clip_val) if trainer.gradient_clip_algorithm in (None, "norm") else math.nan


def watch_clipping(session: Session, trainer: Trainer, pl_module: LightningModule, notice: Notice) -> None:
    """Call ``notice`` each time that the module itself has clipped gradients, in this fit.

    Many modules override ``configure_gradient_clipping`` and do nothing there without a ``gradient_clip_val`` of the
    Trainer, as in the example of Lightning's docs. So an override is taken for clipping only if it writes to the
    gradients. A module may also call ``self.clip_gradients`` in any other place, as under manual optimization.

    Args:
        session: The session of the fit, at whose end the watch ends.
        trainer: Its Trainer.
        pl_module: Its module.
        notice: Called with the optimizer, and what the module did, as part of a sentence. It returns True if no more
            need be noticed; until then each step is looked at.
    """
    plugin = trainer.strategy.precision_plugin
    clip_gradients = plugin.clip_gradients

    def clip_and_notice(optimizer: Optimizer, clip_val: float = 0.0, *args: Any, **kwargs: Any) -> None:
        clip_gradients(optimizer, clip_val, *args, **kwargs)
        if clip_val > 0:
            notice(optimizer, "clips its gradients with `clip_gradients`")

    session.patch(plugin, "clip_gradients", clip_and_notice)
    if not is_overridden("configure_gradient_clipping", pl_module):
        return
    configure = pl_module.configure_gradient_clipping
    is_done = False

    def configure_and_notice(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        nonlocal is_done
        before = None if is_done else _state_of_gradients(optimizer)
        configure(optimizer, *args, **kwargs)
        if before is not None and _state_of_gradients(optimizer) != before:
            is_done = notice(optimizer, "writes to its gradients in `configure_gradient_clipping`, as clipping does")

    session.patch(pl_module, "configure_gradient_clipping", configure_and_notice)


def _state_of_gradients(optimizer: Optimizer) -> tuple[list[int], list[int]]:
    """Return what changes when a gradient is replaced or written to."""
    grads = [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]
    return [id(grad) for grad in grads], shards.versions(grads)
