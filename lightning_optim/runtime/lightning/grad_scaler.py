"""What is asked of a GradScaler, and told to it."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch.amp import GradScaler
from torch.optim import Optimizer


def scaler_of(trainer: Trainer) -> GradScaler | None:
    """The scaler of this run; ``None`` without mixed precision in fp16."""
    found: GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return found


def scale_of(trainer: Trainer) -> float:
    """The loss scale; 1 without a scaler. This waits for the device."""
    scaler = scaler_of(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def agree_on_overflow(trainer: Trainer, optimizer: Optimizer, overflow: bool) -> None:
    """Tell this rank's scaler whether the step that is about to be dropped had infinities.

    A rank that found them alone would lower its scale alone, and DDP averages gradients while they are scaled.
    """
    scaler = scaler_of(trainer)
    if scaler is not None:
        for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            found.fill_(float(overflow))
