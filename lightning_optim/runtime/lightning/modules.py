"""Read and set private state of a LightningModule: its Trainer, device mesh, running hook and hyper-parameters."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod as restricted_classmethod

from lightning_optim.runtime.lightning.private_names import read_private, write_private

__all__ = [
    "detach_trainer",
    "hparams_name",
    "is_attached",
    "restricted_classmethod",
    "running_hook",
    "set_running_hook",
    "share_device_mesh",
]


_NO_NAME = object()


def running_hook(pl_module: LightningModule) -> str | None:
    """Return the name of the hook that Lightning calls now, of a callback or of the module."""
    return read_private(pl_module, "_current_fx_name")


def set_running_hook(pl_module: LightningModule, name: str | None) -> None:
    """Let ``self.log`` log as in the hook of this name."""
    write_private(pl_module, "_current_fx_name", name)


def is_attached(pl_module: LightningModule) -> bool:
    """Return True if a Trainer runs the module, or did."""
    return read_private(pl_module, "_trainer") is not None


def detach_trainer(pl_module: LightningModule) -> None:
    """Remove the module's reference to its Trainer."""
    pl_module.trainer = None


def share_device_mesh(pl_module: LightningModule, member: LightningModule) -> None:
    """Give a member of an ensemble the ensemble's device mesh, by which ``configure_model`` shards."""
    write_private(member, "_device_mesh", read_private(pl_module, "_device_mesh"))


def hparams_name(pl_module: LightningModule) -> dict[str, Any]:
    """Return a checkpoint's entry with the name of the argument that holds the hyper-parameters, as Lightning does.

    It is empty for a module that has hyper-parameters without having called ``save_hyperparameters``.
    """
    name = vars(pl_module).get("_hparams_name", _NO_NAME)
    return {} if name is _NO_NAME else {LightningModule.CHECKPOINT_HYPER_PARAMS_NAME: name}
