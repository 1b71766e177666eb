"""Every entry in bf16-true, and with a fused optimizer under a loss scaler with an infinite loss in one step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.harness.cells import Cell
from tests.harness.reference_loop import Outcome, Weights, deviation
from tests.integration import reference_variants
from tests.integration.entry_fits import CELL, FusedWithInfinity, choice_for, each_entry, fit
from tests.registry import BY_NAME, Entry
from tests.test_matrix import EFFECT, SHOWS, assert_effect

# Most entries agree with the reference loop in every bit. The sum of a penalty is rounded at other places, so that the
# last bit of some weights differs; the mean deviation over the weights was measured to be at most 3.5e-4.
BF16_TOLERANCE = 4.5e-4


class FastCell(Cell):
    """A cell with so large a learning rate that a step changes more than the last bit of a bfloat16."""

    @property
    def lr(self) -> float:
        return 0.05


@each_entry
def test_bf16_true(entry: Entry) -> None:
    cell = FastCell(choice_for(entry, "automatic", "manual", "two"), "32-true", "single", "4short")
    reference = reference_variants.Half(cell, entry).run()
    outcome = fit(entry, cell, precision="bf16-true").outcome
    assert {weight.dtype for weight in outcome.final.values()} == {torch.bfloat16}
    assert outcome.seen == reference.seen
    for what in ("raw", "final"):
        assert distance(getattr(outcome, what), getattr(reference, what)) <= BF16_TOLERANCE, what
    assert outcome.validations == pytest.approx(reference.validations, abs=10 * BF16_TOLERANCE)
    without = reference_variants.Half(cell, replace(entry, formula=entry.without)).run()
    for what in set(SHOWS[entry.acts]) & {"raw", "final"}:
        assert distance(getattr(reference, what), getattr(without, what)) >= EFFECT * BF16_TOLERANCE, what


def distance(one: Weights, other: Weights) -> float:
    """Return the mean of ``|a - b| / (1 + |b|)`` over all elements."""
    assert one.keys() == other.keys()
    parts = [((one[name].float() - b.float()).abs() / (1 + b.float().abs())).flatten() for name, b in other.items()]
    return float(torch.cat(parts).mean())


@each_entry
@pytest.mark.parametrize(("kind", "windows"), [("automatic", "1"), ("manual", "4short"), ("two", "4short")])
def test_fused_with_an_infinity(entry: Entry, kind: Any, windows: Any) -> None:
    cell = Cell(kind, "16-mixed", "single", windows)
    reference = reference_variants.Infinite(cell, entry, batch=FusedWithInfinity.infinite)
    expected = reference.run()
    fitted = fit(entry, cell, FusedWithInfinity)
    assert_equal(fitted.outcome, expected, cell)
    assert all(callback.steps == reference.steps for callback in fitted.ours), "the skipped step was counted"
    assert reference.skipped == 1
    plain = reference_variants.Infinite(
        cell, replace(entry, formula=entry.without), batch=FusedWithInfinity.infinite
    ).run()
    assert_effect(entry, expected, plain, cell)
    assert fitted.trainer.precision_plugin.scaler.get_scale() == reference.scale


def assert_equal(outcome: Outcome, reference: Outcome, cell: Cell) -> None:
    assert outcome.seen == reference.seen
    for what in ("raw", "final"):
        assert max(deviation(getattr(outcome, what), getattr(reference, what)).values()) <= cell.tolerance, what
    assert outcome.validations == pytest.approx(
        reference.validations, rel=cell.value_tolerance, abs=cell.value_tolerance
    )


def test_a_fused_optimizer_is_as_before_the_fit() -> None:
    fitted = fit(BY_NAME["clip_norm"], replace(CELL, precision="16-mixed"), FusedWithInfinity)
    assert fitted.trainer.optimizers[0]._step_supports_amp_scaling
