"""Ask a LightningModule what it overrides, and read and set its Trainer, running hook and hyper-parameters."""

from __future__ import annotations

from typing import Any

import torch

from lightning_optim.runtime.lightning import LightningModule
from lightning_optim.runtime.lightning.packages import of_same_package
from lightning_optim.runtime.lightning.private_names import read_private, write_private
from lightning_optim.runtime.lightning.torch_internals import is_compiled

HPARAMS, HPARAMS_NAME, HPARAMS_TYPE = "hyper_parameters", "hparams_name", "hparams_type"
"""Keys of a checkpoint under which Lightning writes hyper-parameters, the name of their argument and their class."""

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
    return {} if name is _NO_NAME else {HPARAMS_NAME: name}


def lightning_module_class(module: LightningModule | type[LightningModule]) -> type[LightningModule]:
    """Return the ``LightningModule`` of the package that a module, or its class, comes from."""
    return of_same_package(module, "LightningModule")


def is_overridden(name: str, module: LightningModule) -> bool:
    """Return True if a module overrides a hook of LightningModule."""
    return of_same_package(module, "is_overridden", "utilities.model_helpers")(
        name, module, parent=lightning_module_class(module)
    )


def takes_argument(module: LightningModule, hook: str, name: str, **options: Any) -> bool:
    """Return True if a hook takes an argument of this name, by which Lightning decides what to pass."""
    asks = of_same_package(module, "is_param_in_hook_signature", "utilities.signature_utils")
    return asks(getattr(module, hook), name, **options)


def is_wrapped_to_compile(pl_module: LightningModule) -> bool:
    """Return True if the Trainer was given ``torch.compile(module)``: it runs the module with compiled methods."""
    return read_private(pl_module, "_compiler_ctx") is not None


def compile_again(pl_module: LightningModule) -> None:
    """Let torch compile a module again, if any part of it is compiled.

    To be called when hooks were added or removed, which compiled code does not notice.
    """
    if is_wrapped_to_compile(pl_module) or any(map(is_compiled, pl_module.modules())):
        torch.compiler.reset()


def undo_compilation_(module: LightningModule) -> None:
    """Undo what ``torch.compile(module)`` changed in a module.

    Raises:
        ValueError: If it is not compiled.
    """
    of_same_package(module, "to_uncompiled", "utilities.compile")(module)
