"""Read what a module registers, in the dictionaries that torch's ``nn.Module`` keeps under private names.

Nothing else in the package names them. Each has a test that says which one a new version of torch has renamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

REGISTRIES = ("_modules", "_parameters", "_buffers")
"""Attributes of a module that hold its submodules, parameters and buffers by name."""


def buffer_names(module: nn.Module) -> Iterable[str]:
    """Return the names of the module's own buffers, also of those that are ``None``, in their order."""
    return module._buffers.keys()


def buffer_of(module: nn.Module, name: str) -> Tensor | None:
    """Return the module's buffer of this name; ``None`` if it is ``None``, or if there is no such buffer now."""
    return module._buffers.get(name)


def set_buffer(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Bind a buffer of this name, without the checks of ``register_buffer``."""
    module._buffers[name] = value


def is_persistent(module: nn.Module, name: str) -> bool:
    """Return True if the module's ``state_dict`` holds its buffer of this name."""
    return name not in module._non_persistent_buffers_set


def parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return the module's parameter of this name; ``None`` if there is no such parameter now."""
    return module._parameters.get(name)


def registered_names(module: nn.Module) -> list[str]:
    """Return the names of the module's own submodules, parameters and buffers, also of those that are ``None``."""
    return [*module._modules, *module._parameters, *module._buffers]


def is_registered(module: nn.Module, name: str) -> bool:
    """Return True if a submodule, a parameter or a buffer has this name; no attribute is looked up."""
    own = vars(module)
    return any(name in own.get(kind, ()) for kind in REGISTRIES)


def submodule_of(module: nn.Module, name: str) -> Any:
    """Return the submodule of this name; no attribute is looked up.

    Raises:
        KeyError: If there is no such submodule.
    """
    return vars(module)["_modules"][name]


def with_submodules(module: nn.Module, submodules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a shallow copy of the module with these submodules in the place of its own; it shares everything else."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_modules"] = {**module._modules, **submodules}
    return clone


def forward_pre_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks that run before the module's ``forward``, in their order."""
    return list(module._forward_pre_hooks.values())
