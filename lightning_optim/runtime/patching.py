"""Replace an attribute of an object temporarily."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_optim.base.module_registry import is_registered


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context manager: ``owner.name`` is ``value``; afterwards the instance has its own attribute again, or none.

    A parameter, buffer or submodule is an attribute of its module too.

    Raises:
        TypeError: If ``owner`` has no attributes of its own, or if a parameter, buffer or submodule would be replaced
            by something else.
    """
    if not hasattr(owner, "__dict__"):
        raise TypeError(
            f"`{name}` of {type(owner).__name__} cannot be patched: the object has no attributes of its own"
        )
    registered = isinstance(owner, nn.Module) and is_registered(owner, name)
    had, before = registered or name in vars(owner), getattr(owner, name) if registered else vars(owner).get(name)
    if registered and before is not None and value is not None and _kind(before) is not _kind(value):
        raise TypeError(
            f"`{name}` of {type(owner).__name__} is a {_kind(before).__name__}, and can be patched only by another one,"
            f" got {value!r}"
        )
    setattr(owner, name, value)
    try:
        yield
    finally:
        # A plain attribute in whose place a module has registered the value is no longer in its `__dict__`.
        if not registered and (not had or name not in vars(owner)):
            delattr(owner, name)
        if had:
            setattr(owner, name, before)


def _kind(value: Any) -> type:
    return next((kind for kind in (nn.Parameter, nn.Module, Tensor) if isinstance(value, kind)), type(value))
