"""The order of the list changes no result, and a user's callbacks keep their places in it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from lightning_optim import OptimCallback
from lightning_optim.runtime.order import Slot
from tests.harness.cells import Cell
from tests.integration.entry_fits import (
    CELL,
    TENSOR_ENTRIES,
    assert_same,
    differences,
    fit,
    prepare,
    reference_fit,
    states,
)
from tests.lightning import Callback
from tests.registry import BY_NAME, Entry

SEVERAL = BY_NAME["several"]
SIZE = len(SEVERAL.all_callbacks(CELL))

# Each callback comes first, last and beside each other one.
ORDERS = sorted({tuple(order) for i, order in enumerate(itertools.permutations(range(SIZE))) if i % 11 == 0})


class Own(Callback):
    """A user's callback, which counts its setups."""

    def __init__(self) -> None:
        self.setups = 0

    def setup(self, *_: Any, **__: Any) -> None:
        self.setups += 1


class OwnWithoutSlot(OptimCallback):
    """A user's callback that derives from the base class."""


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(map(str, order)))
def test_order_of_the_list(order: tuple[int, ...]) -> None:
    callbacks = SEVERAL.all_callbacks(CELL)
    fitted = fit(SEVERAL, CELL, callbacks=[callbacks[i] for i in order])
    assert_same(fitted, reference_fit(SEVERAL))
    assert not differences(states(callbacks), reference_fit(SEVERAL).states)


@pytest.mark.parametrize("order", ORDERS[::3], ids=lambda order: "".join(map(str, order)))
def test_users_callbacks_keep_their_places(order: tuple[int, ...]) -> None:
    callbacks = SEVERAL.all_callbacks(CELL)
    setups: list[Callback] = []
    for callback in callbacks:
        _note_setup(callback, setups)
    ours = [callbacks[i] for i in order]
    first, second, third = Own(), OwnWithoutSlot(), Own()
    listed: list[Callback] = [first, *ours[:2], second, *ours[2:], third]
    fitted = prepare(SEVERAL, CELL, callbacks=listed)
    given = fitted.trainer.callbacks
    before = list(given)
    fitted.trainer.fit(fitted.module)
    after = fitted.trainer.callbacks
    assert given == before, "Lightning was walking this list"
    assert [after.index(own) for own in (first, second, third)] == [before.index(own) for own in (first, second, third)]
    slots = [cb.slot for cb in after if isinstance(cb, OptimCallback) and cb.slot is not None]
    assert slots == sorted(slots) == [Slot.ACCUMULATE, Slot.PENALIZE, Slot.CLIP, Slot.AVERAGE, Slot.STOP]
    assert first.setups == third.setups == 1
    assert sorted(map(id, setups)) == sorted(map(id, callbacks)), "each setup once"
    assert_same(fitted, reference_fit(SEVERAL))


def _note_setup(callback: Any, setups: list[Callback]) -> None:
    setup = callback.setup

    def noted(*args: Any, **options: Any) -> None:
        setups.append(callback)
        setup(*args, **options)

    callback.setup = noted


STEPS = Cell("automatic", "32-true", "single", "1")


def _commute(pair: tuple[Entry, Entry]) -> bool:
    """Return True if no two callbacks do the same job and each has a slot: one without a slot keeps its place."""
    slots = [callback.slot for entry in pair for callback in entry.callbacks(STEPS)]  # type: ignore[attr-defined]
    return len(set(slots)) == len(slots) and None not in slots


WITH = [BY_NAME[name] for name in ("l1_l2", "clip_norm", "ema", "stop")]
PAIRS = [pair for pair in itertools.product(WITH, TENSOR_ENTRIES) if _commute(pair)]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}, {pair[1].name}")
def test_two_entries_in_either_order(pair: tuple[Entry, Entry]) -> None:
    """Each entry beside one entry of every family that does another job."""
    one, other = ([callback for entry in some for callback in entry.callbacks(STEPS)] for some in (pair, pair[::-1]))
    entry = next((entry for entry in pair if entry.scores), pair[0])
    assert_same(fit(entry, STEPS, callbacks=one), fit(entry, STEPS, callbacks=other))


def test_pairs_cover_all() -> None:
    covered = {entry.name for pair in PAIRS for entry in pair}
    left = {entry.name for entry in TENSOR_ENTRIES if entry.name not in covered}
    slots = {name: [callback.slot for callback in BY_NAME[name].callbacks(STEPS)] for name in left}  # type: ignore[attr-defined]
    assert all(None in some or name == "several" for name, some in slots.items()), f"in no pair: {slots}"
