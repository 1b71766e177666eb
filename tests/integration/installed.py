"""List hooks, replaced methods, attributes and settings, so that a test sees what a fit leaves installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.integration.entry_fits import Fitted
from tests.lightning import Trainer

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def installed(fitted: Fitted) -> dict[str, Any]:
    """List attributes, replaced methods, hooks and settings of the Trainer, the module and the optimizers."""
    trainer, module = fitted.trainer, fitted.module
    found: dict[str, Any] = {}
    for name, owner in _owners(trainer):
        found[f"{name}: attributes"] = sorted(vars(owner))
        found[f"{name}: replaced"] = sorted(key for key, value in vars(owner).items() if _replaced(owner, key, value))
    for index, optimizer in enumerate(trainer.optimizers):
        found[f"optimizer {index}: hooks"] = {name: len(getattr(optimizer, name)) for name in _HOOKS}
        found[f"optimizer {index}: flag"] = getattr(optimizer, "_step_supports_amp_scaling", None)
        found[f"optimizer {index}: replaced"] = sorted(
            k for k, v in vars(optimizer).items() if _replaced(optimizer, k, v)
        )
    for name, part in module.named_modules():
        found[f"module {name}: hooks"] = {k: len(v) for k, v in vars(part).items() if k.endswith("_hooks") and v}
        found[f"module {name}: attributes"] = sorted(vars(part))
    for name, parameter in module.named_parameters():
        found[f"parameter {name}"] = (sorted(vars(parameter)), parameter._backward_hooks, parameter.requires_grad)
    return found | settings(trainer)


def settings(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a Trainer that users set and read."""
    return {
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "num_sanity_val_steps": trainer.num_sanity_val_steps,
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "val_check_interval": trainer.val_check_interval,
    }


def _owners(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    fit_loop = trainer.fit_loop
    yield "trainer", trainer
    yield "strategy", trainer.strategy
    yield "precision", trainer.precision_plugin
    yield "fit_loop", fit_loop
    yield "epoch_loop", fit_loop.epoch_loop
    yield "val_loop", fit_loop.epoch_loop.val_loop
    yield "automatic", fit_loop.epoch_loop.automatic_optimization
    yield "manual", fit_loop.epoch_loop.manual_optimization
    yield "connector", trainer._checkpoint_connector


def _replaced(owner: Any, name: str, value: Any) -> bool:
    """Return True if an attribute of the instance hides a method of its class."""
    return callable(value) and callable(getattr(type(owner), name, None))
