"""Version of the state that a callback has in a checkpoint, and the conversion of states of earlier versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VERSION = 2
_KEY = "state_version"


def with_version(state: dict[str, Any]) -> dict[str, Any]:
    """Return a callback's state for a checkpoint, with the version of its layout."""
    return {_KEY: VERSION, **state}


def converted(callback: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a callback's state from a checkpoint in the present layout, without its version.

    Args:
        callback: The callback that will load it.
        state: The state. Without a version it is of the first one, or of Lightning's own callback.

    Raises:
        ValueError: If a later version of the package wrote it.
    """
    state = dict(state)
    version = state.pop(_KEY, 1)
    if version > VERSION:
        raise ValueError(
            f"The checkpoint holds the state of {callback} in version {version}, and this lightning_optim reads"
            f" versions up to {VERSION}: resume with the version of the package that wrote it, or a later one."
        )
    for convert in _CONVERSIONS[version - 1 :]:
        state = convert(callback, state)
    return state


def _from_first(callback: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Name the states of combined criteria, which the first checkpoints held in their order only."""
    if "criterion" not in state:
        return state
    return {**state, "criterion": _with_identities(callback.criterion, state["criterion"])}


def _with_identities(criterion: Any, state: dict[str, Any]) -> dict[str, Any]:
    saved, criteria = state.get("criteria", []), getattr(criterion, "criteria", [])
    if not saved or all(isinstance(entry, list | tuple) for entry in saved):
        return state
    if [sorted(entry) for entry in saved] != [sorted(one.state_dict()) for one in criteria]:
        raise ValueError(
            f"This checkpoint of an earlier version holds the states of {len(saved)} criteria in their order, and they"
            f" are not those of {[one.identity for one in criteria]}: resume with the same criteria in the same order."
        )
    return {
        **state,
        "criteria": [[one.identity, _with_identities(one, s)] for one, s in zip(criteria, saved, strict=True)],
    }


# Each converts from its place in the list, counted from 1, to the next version.
_CONVERSIONS: list[Callable[[Any, dict[str, Any]], dict[str, Any]]] = [_from_first]
