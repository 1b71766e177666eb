"""Remember that the last fit of a callback ran in another object: in a copy of it, or in other processes.

A package may copy the Trainer or its arguments before it trains (``copy.deepcopy(trainer)``), and launchers such as
``ddp_spawn`` copy the Trainer into other processes. Then the user's own object is as before the fit. Each callback has
a token, and a copy knows the tokens of the objects that it descends from. When a copy begins a fit, those of them that
are in this process are marked, and an error says so where they are asked for what they do not have. Nothing is kept but
a mark: a copy lives no longer than its Trainer.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Literal, TypeAlias
from weakref import WeakValueDictionary

from lightning_optim.runtime.order import SessionCallback

RanIn: TypeAlias = Literal["", "a copy", "other processes"]

_callbacks: WeakValueDictionary[str, SessionCallback] = WeakValueDictionary()
"""Callbacks of this process, by their token."""


def register(callback: SessionCallback) -> None:
    """Give a new callback, or a new copy of one, its token."""
    callback._token = uuid.uuid4().hex
    _callbacks[callback._token] = callback


def ancestors_of_copy(callback: SessionCallback) -> tuple[str, ...]:
    """Return the tokens from which a copy of ``callback`` descends, the oldest first, without objects that are gone."""
    return tuple(token for token in (*callback._ancestors, callback._token) if token in _callbacks)


def find(tokens: Iterable[str]) -> SessionCallback | None:
    """Return the callback of this process that has the latest of these tokens; ``None`` if no callback has one."""
    return next((found for token in reversed([*tokens]) if (found := _callbacks.get(token)) is not None), None)


def begins_fit(callback: SessionCallback) -> None:
    """Mark that a fit runs in this object, and, in the objects that it was copied from, that it runs in a copy.

    An object that is in a fit of its own is not marked: the fit of the copy runs within that fit.
    """
    callback.ran_in, callback.not_returned = "", ""
    for token in callback._ancestors:
        if (ancestor := _callbacks.get(token)) is not None and ancestor.fit is None:
            ancestor.ran_in = "a copy"


def check_not_lost(callback: SessionCallback) -> None:
    """Raise if the callback's last fit ran in other processes, and its attributes did not come back.

    Raises:
        RuntimeError: It names the reason, and what to do instead.
    """
    if callback.not_returned:
        raise RuntimeError(f'{reason_lost(callback)} Train with `strategy="ddp"`, or load a checkpoint of that fit.')


def reason_lost(callback: SessionCallback) -> str:
    """Return a sentence that says why the attributes did not come back from other processes."""
    name = type(callback).__name__
    return f"The fit ran in other processes, and {name} could not be sent back from there: {callback.not_returned}."


def check_weights_are_here(callback: SessionCallback, what: str, remedy: str) -> None:
    """Raise if the callback's last fit ran in other processes, in which its weights have stayed.

    Args:
        callback: The callback that is asked for weights.
        what: The weights, for the message: ``"the average"``.
        remedy: A sentence that says where else they are, or what to change.

    Raises:
        RuntimeError: It names the remedy.
    """
    if callback.ran_in == "other processes":
        raise RuntimeError(
            f"The fit ran in other processes (a strategy such as `ddp_spawn`), and {what} of {type(callback).__name__}"
            f" stayed there: only the module's weights come back. {remedy}"
        )


def check_no_copy_ran(callback: SessionCallback) -> None:
    """Raise if the last fit ran in a copy of the callback; to be called where this object has nothing to show.

    Raises:
        RuntimeError: It says how to get the copy.
    """
    if callback.ran_in == "a copy":
        name = type(callback).__name__
        raise RuntimeError(
            f"The fit ran with a copy of this {name}, which has no results itself: something copied the callback, as"
            " packages do that copy a Trainer or its arguments. Take the copy from the Trainer that ran:"
            f" `next(callback for callback in trainer.callbacks if isinstance(callback, {name}))`."
        )
