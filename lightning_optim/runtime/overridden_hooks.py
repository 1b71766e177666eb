"""Hooks that a subclass overrides without `super()`: the package's own part runs all the same."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_optim.runtime.lightning import Callback

if TYPE_CHECKING:
    from lightning_optim.runtime.callback import OptimCallback

_PACKAGE = __name__.partition(".")[0]
_OF_LIGHTNING = {name for name, value in vars(Callback).items() if inspect.isfunction(value) and name[0] != "_"}
# To override the hook of a step means to change what is done to the step.
_HOOKS = _OF_LIGHTNING - {"on_before_optimizer_step"} | {"reset", "extra_state", "load_extra_state", "rank_state"}


def guard(cls: type[OptimCallback]) -> None:
    """Let each hook that a class of this package defines run once in a turn, for :func:`bind`.

    A user's class is left alone. To be called when the class is made.
    """
    if _is_ours(cls):
        for name in _HOOKS & vars(cls).keys():
            setattr(cls, name, _once(name, vars(cls)[name]))


def bind(callback: OptimCallback) -> None:
    """Put our own part before each hook that a user overrides, in a subclass, a mixin or on the callback itself."""
    for name in _HOOKS:
        ours, theirs = _parts(type(callback), name)
        on_itself = callback.__dict__.get(name)
        if ours is not None and not isinstance(on_itself, Bound) and (on_itself or theirs):
            callback.__dict__[name] = Bound(callback, name, ours, on_itself)


def _parts(kind: type, name: str) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """Find a hook as this package defines it, and as another class does: a subclass, or one beside ours (a mixin)."""
    package = next(cls for cls in kind.__mro__ if _is_ours(cls)).__mro__
    ours = next((vars(cls)[name] for cls in package if _is_ours(cls) and name in vars(cls)), None)
    theirs = next((vars(cls)[name] for cls in kind.__mro__ if cls not in package and name in vars(cls)), None)
    return ours, theirs


def is_overridden(callback: OptimCallback, name: str) -> bool:
    """Return whether a user's class, or the callback itself, overrides a method of this package."""
    return name in vars(callback) or not _is_ours(next(cls for cls in type(callback).__mro__ if name in vars(cls)))


def without_bound(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return a callback's attributes as they were before :func:`bind`: a copy is bound by a run of its own."""
    attributes = {name: value for name, value in attributes.items() if name != "_done"}
    bound = {name: value for name, value in attributes.items() if isinstance(value, Bound)}
    on_itself = {name: value.on_itself for name, value in bound.items() if value.on_itself}
    return {name: value for name, value in attributes.items() if name not in bound} | on_itself


class Bound:
    """A hook in two parts: that of this package, then the user's, in which ``super()`` finds that ours is done.

    Dictionaries of state that both return are merged.

    Attributes:
        on_itself: The user's function, if it is an attribute of the callback itself and not of its class.
    """

    def __init__(
        self, callback: OptimCallback, name: str, ours: Callable[..., Any], on_itself: Callable[..., Any] | None
    ) -> None:
        # A callback that held itself would keep the weights that it holds until the garbage is collected.
        self._callback, self._name, self._ours, self.on_itself = weakref.ref(callback), name, ours, on_itself

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        callback = self._callback()
        assert callback is not None
        done = callback._done
        # Of a call within the user's part of another, such as a second validation, ours is to be done again.
        callback._done = {name: result for name, result in done.items() if name != self._name}
        try:
            result = self._ours(callback, *args, **kwargs)
            callback._done = {**done, self._name: result}
            theirs = self.on_itself or _of_class(callback, self._name)
            said = theirs(*args, **kwargs) if theirs else None
        finally:
            callback._done = done
        return {**result, **(said or {})} if isinstance(result, dict) else said


def _of_class(callback: OptimCallback, name: str) -> Callable[..., Any] | None:
    """Bind the user's hook to the callback as Python does: it may be a class method, or partial."""
    of_class: Any = _parts(type(callback), name)[1]
    return of_class.__get__(callback, type(callback)) if hasattr(of_class, "__get__") else of_class


def _once(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def once(self: OptimCallback, *args: Any, **kwargs: Any) -> Any:
        return self._done[name] if name in self._done else hook(self, *args, **kwargs)

    return once


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == _PACKAGE
