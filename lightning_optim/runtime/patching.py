"""Replace an attribute of an object temporarily."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_optim.base.module_registry import is_registered


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context manager: ``owner.name`` is ``value``; afterwards the instance has its own attribute again, or none.

    A parameter, buffer or submodule is an attribute of its module too. A function in place of a method is left out of
    copies of the owner, see :class:`Patch`.

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
    if isinstance(value, types.FunctionType) and callable(getattr(type(owner), name, None)):
        value = _patch_of(owner, name, value, before)
    setattr(owner, name, value)
    try:
        yield
    finally:
        # A plain attribute in whose place a module has registered the value is no longer in its `__dict__`.
        if not registered and (not had or name not in vars(owner)):
            delattr(owner, name)
        if had:
            setattr(owner, name, before)


class Patch:
    """Stand for a function in place of a method. A pickled or deep-copied owner has its own method again.

    Trainer and callbacks are pickled in the middle of a fit where a module has them among its hyper-parameters, and
    copied by packages; a function that is defined within another cannot be pickled.

    Args:
        owner: The object whose method is replaced.
        name: The name of the method.
        function: Called in its place.
        before: The attribute that the object itself had; ``None`` for the method of its class.
    """

    def __init__(self, owner: Any, name: str, function: types.FunctionType, before: Any) -> None:
        functools.update_wrapper(self, function)
        self._owner = weakref.ref(owner)
        self.name, self.function, self.before = name, function, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpatched, (self._owner(), self.name, self.before)


_OF_OWNER: weakref.WeakKeyDictionary[Any, dict[tuple[str, types.FunctionType], Patch]] = weakref.WeakKeyDictionary()


def _patch_of(owner: Any, name: str, function: types.FunctionType, before: Any) -> Patch:
    """Make a patch, and the same one each time for a function that is defined in no other.

    With a new one torch 2.7 compiles a step again, and 2.13 does not.
    """
    if before is not None or "<locals>" in function.__qualname__:
        return Patch(owner, name, function, before)
    known = _OF_OWNER.setdefault(owner, {})
    return known.setdefault((name, function), Patch(owner, name, function, before))


def without_patches(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of an object as they were before the patches that are in force."""
    found = {}
    for name, value in attributes.items():
        is_patched = isinstance(value, Patch)
        while isinstance(value, Patch):
            value = value.before
        if value is not None or not is_patched:
            found[name] = value
    return found


def _unpatched(owner: Any, name: str, before: Any) -> Any:
    # The owner is not complete yet while it is unpickled, so the method is taken from its class.
    return getattr(type(owner), name).__get__(owner) if before is None else before


def _kind(value: Any) -> type:
    return next((kind for kind in (nn.Parameter, nn.Module, Tensor) if isinstance(value, kind)), type(value))
