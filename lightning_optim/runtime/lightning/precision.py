"""Ask the GradScaler of a run with fp16, and let it unscale and skip as all ranks need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_optim.runtime.lightning import Trainer
from lightning_optim.runtime.lightning.private_names import entry_of, read_private


def scaler_of(trainer: Trainer) -> GradScaler | None:
    """Return the scaler of this run; ``None`` without mixed precision in fp16."""
    found: GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return found


def scale_of(trainer: Trainer) -> float:
    """Return the loss scale; 1 without a scaler. This waits for the device."""
    scaler = scaler_of(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def unscale_before_hooks(trainer: Trainer, optimizer: Optimizer, replace: Callable[[Any, str, Any], None]) -> None:
    """Let the scaler unscale gradients before hooks, of a fused optimizer too.

    A fused optimizer unscales inside its step, after every hook. If its attribute says that it cannot, Lightning
    unscales before the hooks, and the scaler itself skips a step with infinities, as with any other optimizer. The
    price is that each step waits for the scaler's verdict, as it does with any other optimizer too.

    Args:
        trainer: The Trainer.
        optimizer: One of its optimizers.
        replace: Sets an attribute of an object for the length of the fit.
    """
    if scaler_of(trainer) is None:
        return
    of_torch = type(optimizer).__module__.startswith("torch.optim.")
    fused = of_torch and any(group.get("fused") for group in optimizer.param_groups)
    if fused and not hasattr(optimizer, "_step_supports_amp_scaling"):
        raise RuntimeError(f"{type(optimizer).__name__}: {entry_of('_step_supports_amp_scaling').message()}.")
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        replace(optimizer, "_step_supports_amp_scaling", False)


def agree_on_overflow(trainer: Trainer, optimizer: Optimizer, overflow: bool) -> None:
    """Tell this rank's scaler the verdict of all ranks: whether the step that is about to be dropped had infinities.

    A rank that found infinities alone would lower its scale alone. Then the scales of the ranks would differ, and DDP
    averages gradients while they are scaled. If ``training_step`` returned ``None`` on the last batch of a window,
    nothing is unscaled, the scaler checks no gradient, and there is nothing to tell it.

    Raises:
        RuntimeError: If the scaler keeps nothing by which it could be told.
    """
    scaler = scaler_of(trainer)
    if scaler is None:
        return
    found = read_private(scaler, "_per_optimizer_states")[id(optimizer)].get("found_inf_per_device")
    if found is None:
        raise RuntimeError(
            f"The scaler has no `found_inf_per_device` for this step: {entry_of('_per_optimizer_states').message()}."
        )
    for flag in found.values():
        flag.fill_(float(overflow))
