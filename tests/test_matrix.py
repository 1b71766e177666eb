"""Every entry of the registry in its cells, compared with the reference loop at the same precision."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math

import pytest

import lightning_optim
from tests import registry
from tests.harness.cells import CELLS, LEVELS, Cell, orthogonal_array
from tests.harness.process_group import Group
from tests.harness.reference_loop import Loop, Outcome, deviation
from tests.registry import ALL_ENTRIES, Entry, chosen_cells, parts_of, refused

EFFECT = 20  # Least effect of a technique in a cell, in tolerances, so that a wrong factor is seen.

# Results that must show the effect of a technique, by the quantity that it acts on.
SHOWS = {
    "gradients": ("raw", "final"),
    "weights": ("raw", "final"),
    "windows": ("raw", "final"),
    "evaluation": ("final", "validations"),
    "run": ("final", "seen"),
    "end": ("final",),
    "nothing": (),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        every = metafunc.config.getoption("--matrix")
        pairs = [(entry, cell) for entry in ALL_ENTRIES for cell in (CELLS if every else chosen_cells(entry))]
        metafunc.parametrize(("entry", "cell"), pairs, ids=[f"{entry.name}-{cell}" for entry, cell in pairs])


def test_cell(entry: Entry, cell: Cell, group: Group) -> None:
    if refused(entry, cell.sharded, lambda: fit(entry, cell, group)):
        return
    expected = reference(entry, cell.whole)
    for outcome in fit(entry, cell, group):
        assert_equal(outcome, expected, cell)
    assert_effect(entry, expected, without(entry, cell.whole), cell)


def fit(entry: Entry, cell: Cell, group: Group) -> list[Outcome]:
    """Return the outcome of each rank."""
    if cell.processes == 1:
        return [registry.fit(entry.name, cell)]
    return group.run(registry.fit, entry.name, cell)


@functools.cache
def reference(entry: Entry, cell: Cell) -> Outcome:
    return Loop(cell, entry.formula(cell), entry.scores, entry.epochs).run()


@functools.cache
def without(entry: Entry, cell: Cell) -> Outcome:
    return Loop(cell, entry.without(cell), epochs=entry.epochs).run()


def assert_equal(outcome: Outcome, expected: Outcome, cell: Cell) -> None:
    assert outcome.seen == expected.seen, "the run ended elsewhere"
    for name, error in deviation(outcome.raw, expected.raw).items():
        assert error <= cell.tolerance, f"the weights that trained differ in {name}"
    for name, error in deviation(outcome.final, expected.final).items():
        assert error <= cell.tolerance, f"the weights at the end differ in {name}"
    assert outcome.validations == pytest.approx(
        expected.validations, rel=cell.value_tolerance, abs=cell.value_tolerance
    )
    for name, values in expected.logged.items():
        logged = {position: outcome.logged.get(name, {}).get(position, math.nan) for position in values}
        assert logged == pytest.approx(values, rel=cell.value_tolerance, abs=cell.value_tolerance), name


def assert_effect(entry: Entry, expected: Outcome, plain: Outcome, cell: Cell) -> None:
    """Assert that the technique had an effect of at least ``EFFECT`` tolerances, in the weights of each optimizer."""
    for what in SHOWS[entry.acts]:
        one, other = getattr(expected, what), getattr(plain, what)
        if what == "seen":
            assert one != other
        elif what == "validations":
            effect = max(abs(a - b) / (1 + abs(b)) for a, b in zip(one, other, strict=True))
            assert effect >= EFFECT * cell.value_tolerance, f"the validations change by {effect:.1e} only"
        else:
            effects = deviation(one, other)
            for index in range(cell.optimizers):
                prefix = f"net.{index}." if cell.optimizers > 1 else "net."
                effect = max(effect for name, effect in effects.items() if name.startswith(prefix))
                assert effect >= EFFECT * cell.tolerance, f"optimizer {index}: {what} changes by {effect:.1e} only"


def test_each_public_callback_and_policy_has_an_entry() -> None:
    base = (lightning_optim.OptimCallback, lightning_optim.Policy)
    public = {getattr(lightning_optim, name) for name in lightning_optim.__all__}
    concrete = {cls for cls in public if inspect.isclass(cls) and issubclass(cls, base)} - BASES
    used = {
        type(part) for entry in ALL_ENTRIES for callback in entry.all_callbacks(CELLS[0]) for part in parts_of(callback)
    }
    assert concrete <= used, f"no entry has {sorted(cls.__name__ for cls in concrete - used)}"
    assert not BASES & used, "an entry has an object of a base class"


# Base classes, of which no objects are made.
BASES = {
    getattr(lightning_optim, name)
    for name in (
        "Average",
        "Clipping",
        "Criterion",
        "NormClipping",
        "OptimCallback",
        "Penalty",
        "Policy",
        "Proximal",
        "Schedule",
    )
}


@pytest.mark.parametrize("turn", range(9))
def test_an_array_holds_each_pair_of_levels_once(turn: int) -> None:
    cells = [dataclasses.astuple(cell) for cell in orthogonal_array(turn)]
    for one, other in itertools.combinations(range(len(LEVELS)), 2):
        pairs = sorted((cell[one], cell[other]) for cell in cells)
        assert pairs == sorted(itertools.product(LEVELS[one], LEVELS[other]))


def test_nine_arrays_hold_all_cells() -> None:
    assert {cell for turn in range(9) for cell in orthogonal_array(turn)} == set(CELLS)


def test_arrays_of_the_entries_hold_all_cells() -> None:
    entries = [entry for entry in ALL_ENTRIES if entry.cells == "array"]
    assert {cell for entry in entries for cell in chosen_cells(entry)} == set(CELLS)


def test_a_new_entry_leaves_the_cells_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {entry.name: chosen_cells(entry) for entry in ALL_ENTRIES}
    monkeypatch.setattr(registry, "ALL_ENTRIES", (dataclasses.replace(ALL_ENTRIES[0], name="new"), *ALL_ENTRIES))
    assert {entry.name: chosen_cells(entry) for entry in ALL_ENTRIES} == before


def test_one_entry_of_each_slot_is_in_all_cells() -> None:
    everywhere = [entry for entry in ALL_ENTRIES if entry.cells == "all"]
    slots = [callback.slot for entry in everywhere for callback in entry.callbacks(CELLS[0])]
    assert {slot for slot in slots if slot is not None} == set(lightning_optim.Slot)


def test_criteria_see_each_strategy() -> None:
    for entry in ALL_ENTRIES:
        assert {cell.strategy for cell in chosen_cells(entry)} == set(LEVELS[2])
