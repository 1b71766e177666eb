"""Give public classes and functions the name of the package in which users find them."""

from __future__ import annotations

from typing import Any


def publish(namespace: dict[str, Any]) -> list[str]:
    """Name a package as the module of each class and function in its namespace; return their names.

    So a pickle names the public place of a class, and outlives a move of the file that defines it. To be called at the
    end of the package's ``__init__``.

    Args:
        namespace: The package's ``globals()``.
    """
    public = {name: thing for name, thing in namespace.items() if name[0] != "_" and hasattr(thing, "__qualname__")}
    public.pop("publish", None)
    for thing in public.values():
        thing.__module__ = namespace["__name__"]
    return sorted(public)
