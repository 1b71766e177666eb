"""Ask the GradScaler of a run with fp16, and let it unscale and skip as all ranks need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
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
    averages gradients while they are scaled.
    """
    for flag in overflow_flags(trainer, optimizer):
        flag.fill_(float(overflow))


def skips_step(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Return True if the scaler will skip the step that is about to be taken, since a gradient had infinities.

    Without a scaler nothing waits for the device; with one, it waits here for the verdict that the scaler itself would
    wait for next.
    """
    return any(bool(flag) for flag in overflow_flags(trainer, optimizer))


def overflow_flags(trainer: Trainer, optimizer: Optimizer) -> list[Tensor]:
    """Return the scaler's verdict on the present gradients, live: a flag for each device, not 0 after an overflow.

    Without a scaler there is none. If ``training_step`` returned ``None`` on the last batch of a window, nothing is
    unscaled, and the scaler checks no gradient.

    Raises:
        RuntimeError: If the scaler keeps nothing by which it could be asked.
    """
    scaler = scaler_of(trainer)
    if scaler is None:
        return []
    found = read_private(scaler, "_per_optimizer_states")[id(optimizer)].get("found_inf_per_device")
    if found is None:
        raise RuntimeError(
            f"The scaler has no `found_inf_per_device` for this step: {entry_of('_per_optimizer_states').message()}."
        )
    return list(found.values())


def after_gradients(
    trainer: Trainer, act: Callable[[Optimizer], None], replace: Callable[[Any, str, Any], None]
) -> None:
    """Call ``act(optimizer)`` in each step after all hooks and clipping, just before the optimizer moves the weights.

    An optimizer computes the gradients within its own ``step``, by a closure, so that a hook that torch runs before the
    step would act before the forward pass.

    Args:
        trainer: The Trainer.
        act: The function.
        replace: Sets an attribute of an object for the length of the fit.
    """
    plugin = trainer.precision_plugin
    after_closure = read_private(plugin, "_after_closure")

    def after_closure_and_act(model: Any, optimizer: Any) -> None:
        after_closure(model, optimizer)
        act(optimizer)

    replace(plugin, "_after_closure", after_closure_and_act)
