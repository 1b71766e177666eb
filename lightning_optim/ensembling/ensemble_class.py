"""Make the class of an ensemble at run time: its steps are the first member's, and must reach the combined call."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable
from typing import Any, NoReturn

from lightning_optim.runtime.lightning import LightningModule, rank_zero_warn
from lightning_optim.runtime.lightning.modules import lightning_module_class


class ClassMethodOnly(classmethod):
    """Make a class method that raises an error when it is called on an object, which it would not change."""

    def __get__(self, instance: Any, owner: type | None = None, /) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            name = f"{type(instance).__name__}.{self.__func__.__name__}"
            raise TypeError(f"`{name}` makes a new object: call it on the class, not on an object.")

        return super().__get__(instance, owner) if instance is None else refuse


STEPS = ("validation_step", "test_step", "predict_step")
_classes: dict[tuple[type, type, tuple[str, ...]], type] = {}


def ensemble_class(
    base: Any, member_class: type[LightningModule], instance_steps: tuple[str, ...], forward: Callable[..., Any]
) -> type:
    """Make, or find, the class of an ensemble: a subclass of ``base`` and of the first member's class.

    In this class Lightning finds the user's steps, hooks and loaders, and runs them unchanged. A deep copy of the first
    member with another ``forward`` would be simpler, but silently wrong if a step calls ``self.net(x)``: here a step
    that never reaches the combined call raises. The class's ``_class_arguments`` are the first three arguments here.

    Args:
        base: The class that the user called, :class:`~lightning_optim.Ensemble` or a subclass of it; or a class that
            was made here.
        member_class: The first member's class.
        instance_steps: Names of the steps that the first member has on the instance, not in its class.
        forward: ``Ensemble.forward``. Unless ``base`` overrides it, the class has it with the signature of the member's
            ``forward``, by which ``torch.export`` names inputs and dynamic shapes.
    """
    key = (base._class_arguments[0] if base._class_arguments else base, member_class, instance_steps)
    if key not in _classes:
        body = _class_body(*key, forward)
        # TorchScript writes the name of the class into its files, as source code.
        name = re.sub(r"\W", "_", f"{key[0].__name__}Of{member_class.__name__}")
        _classes[key] = types.new_class(name, key[:2], exec_body=lambda namespace: namespace.update(body))
    return _classes[key]


def _class_body(
    base: Any, member_class: type[LightningModule], instance_steps: tuple[str, ...], forward: Callable[..., Any]
) -> dict[str, Any]:
    body: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__}
    theirs = lightning_module_class(member_class)
    for name in STEPS:
        step = getattr(member_class, name)
        if name == "predict_step" or name in instance_steps or step is not getattr(theirs, name):
            body[name] = _checked_step(name, step)
        if name in instance_steps:
            del body[name].__wrapped__  # Lightning would find its own step there, and take the step for not overridden
    if base.forward is forward:
        body["forward"] = _with_signature_of(member_class.forward, forward)
    return {**body, "_class_arguments": (base, member_class, instance_steps)}


def _with_signature_of(like: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    called.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return called


def _checked_step(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the step with two checks: it must reach the combined call, and should use no other layer of a member.

    The second is a warning, at the first call of a stage.
    """

    @functools.wraps(step)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = instance_method(self, name) or types.MethodType(step, self)
        with self._combined.expected_in(name):
            if name in self._checked_steps:
                return run(*args, **kwargs)
            self._checked_steps.add(name)
            with self._combined.layers_outside() as outside:
                result = run(*args, **kwargs)
        if outside:
            called = "" if self._combined.on is None else ", or to None if the step calls `self(…)`"
            rank_zero_warn(
                f"`{name}` also used layers of the first member outside of the combined call"
                f" (`on={self._combined.on!r}`): {sorted(outside)}. Metrics computed from their output are one"
                f" member's: use others, or set `on` to a submodule that holds these layers{called}."
            )
        return result

    return checked


def instance_method(ensemble: Any, name: str) -> Callable[..., Any] | None:
    """Return a method that the first member has on the instance, bound to the ensemble; ``None`` if it has none."""
    first = ensemble.members[0]
    method: Any = vars(first).get(name)
    bound = isinstance(method, types.MethodType) and method.__self__ is first
    return types.MethodType(method.__func__, ensemble) if bound else method
