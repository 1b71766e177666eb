"""Run the package's part of a hook before a user's, so that a subclass needs no ``super()`` in a hook it overrides."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lightning_optim.runtime.lightning import CallbackBase
from lightning_optim.runtime.lightning.packages import is_of_lightning
from lightning_optim.runtime.patching import without_patches

_PACKAGE = __name__.partition(".")[0]
# The hooks of a step are left out: a subclass that overrides one changes the step itself, and decides by `super()`.
_HOOKS_OF_A_STEP = {"on_before_optimizer_step", "on_before_weight_update", "on_after_optimizer_step"}
_OTHER_HOOKS = {"setup", "teardown", "state_dict", "load_state_dict"}
_OTHER_HOOKS |= {"reset", "extra_state", "load_extra_state", "rank_state"}


class OverridableHooks(CallbackBase):
    """Run the hooks of a callback in two parts: the package's own, then that of a user's class, mixin or object.

    So a user's subclass that forgets ``super()`` keeps the callback's own work, one that calls it does not do that work
    twice, and the package needs no second set of private hooks.

    A class of this package has its hooks wrapped when it is made (:func:`_once`). A hook that is overridden outside of
    the package is replaced on the object by a :class:`TwoPartHook` when a Trainer sets ``log``: at the start of each
    run, before its first hook, when every override is in place.
    """

    _package_results: Mapping[str, Any] = MappingProxyType({})  # results of the parts that have run

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _is_of_package(cls):
            for name in filter(_is_hook, list(vars(cls))):
                setattr(cls, name, _once(name, vars(cls)[name]))

    @property
    def log(self) -> Callable[..., None]:
        """The module's ``log``. Lightning sets it at the start of each run, before the first hook."""
        try:
            found: Callable[..., None] = self.__dict__["log"]
        except KeyError:
            raise AttributeError(
                f"{type(self).__name__} has `log` only while a Trainer runs; call it in a hook"
            ) from None
        return found

    @log.setter
    def log(self, log: Callable[..., None]) -> None:
        self.__dict__["log"] = log
        for name in _hooks_of_package(type(self)):
            package_part, override = _parts(type(self), name)
            on_object = self.__dict__.get(name)
            if package_part is not None and not isinstance(on_object, TwoPartHook) and (on_object or override):
                self.__dict__[name] = TwoPartHook(self, name, package_part, on_object)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the module that ``log`` is bound to, and with hooks as they were before a run.

        Lightning binds the module's ``log`` and ``log_dict`` to every callback, and with them the module.
        """
        attributes = without_patches(self.__dict__)
        held = {n: value for n, value in attributes.items() if n not in ("log", "log_dict", "_package_results")}
        hooks = {name: value for name, value in held.items() if isinstance(value, TwoPartHook)}
        on_object = {name: hook.on_object for name, hook in hooks.items() if hook.on_object}
        return {name: value for name, value in held.items() if name not in hooks} | on_object


class TwoPartHook:
    """Run the package's part of a hook, then the user's, whose ``super()`` call finds that the first has run.

    If both parts return a dictionary of state, the two are merged.

    Attributes:
        on_object: The user's function, if it is an attribute of the callback itself and not of its class.
    """

    def __init__(
        self,
        callback: OverridableHooks,
        name: str,
        package_part: Callable[..., Any],
        on_object: Callable[..., Any] | None,
    ) -> None:
        # A reference cycle would keep the weights that a callback holds until the garbage is collected.
        self._callback, self._name, self._package_part = weakref.ref(callback), name, package_part
        self.on_object = on_object

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        callback = self._callback()
        assert callback is not None
        before = callback._package_results
        # The user's part may start another run of this hook, such as a second validation's: both parts run in it.
        callback._package_results = {name: result for name, result in before.items() if name != self._name}
        try:
            result = self._package_part(callback, *args, **kwargs)
            callback._package_results = {**before, self._name: result}
            override = self.on_object or _bound_override(callback, self._name)
            returned = override(*args, **kwargs) if override else None
        finally:
            callback._package_results = before
        return {**result, **(returned or {})} if isinstance(result, dict) else returned


def is_overridden_by_user(owner: object, name: str) -> bool:
    """Return True if a user's class, or the callback or module itself, overrides a method of this package."""
    definer = next(cls for cls in type(owner).__mro__ if name in vars(cls))
    return name in vars(owner) or not (_is_of_package(definer) or is_of_lightning(definer))


def _once(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a hook of this package: return the first result when a user's part calls it again through ``super()``."""

    @functools.wraps(hook)
    def once(self: OverridableHooks, *args: Any, **kwargs: Any) -> Any:
        return self._package_results[name] if name in self._package_results else hook(self, *args, **kwargs)

    return once


def _is_hook(name: str) -> bool:
    return name in _OTHER_HOOKS or (name.startswith("on_") and name not in _HOOKS_OF_A_STEP)


def _hooks_of_package(kind: type) -> set[str]:
    """Return the names of the hooks that classes of this package define, among a class and its bases."""
    return {name for cls in kind.__mro__ if _is_of_package(cls) for name in vars(cls) if _is_hook(name)}


def _parts(kind: type, name: str) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """Find a hook as a class of this package defines it, and as a user's class does: a subclass or a mixin."""
    package = next(cls for cls in kind.__mro__ if _is_of_package(cls)).__mro__
    package_part = next((vars(cls)[name] for cls in package if _is_of_package(cls) and name in vars(cls)), None)
    override = next((vars(cls)[name] for cls in kind.__mro__ if cls not in package and name in vars(cls)), None)
    return package_part, override


def _bound_override(callback: OverridableHooks, name: str) -> Callable[..., Any] | None:
    """Bind the override of the user's class as Python does: it may be a class method, or partial."""
    override: Any = _parts(type(callback), name)[1]
    return override.__get__(callback, type(callback)) if hasattr(override, "__get__") else override


def _is_of_package(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == _PACKAGE
