"""Every entry in bf16-true, and with a fused optimizer under the scaler with an infinity in one step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.cells import MOMENTUM, Cell
from tests.harness.formulas import deviation
from tests.harness.reference_loop import Outcome, Weights
from tests.integration import reference_variants
from tests.integration.entry_fits import CELL, each_entry, fit, turn
from tests.registry import BY_NAME, Entry
from tests.test_matrix import EFFECT, SHOWS, assert_effect

# Most entries agree with the loop in every bit. A penalty's sum is rounded at other places, so that a last bit flips
# here and there; the mean over the weights was seen to be at most 3.5e-4.
BF16_TOLERANCE = 4.5e-4
INFINITE = 6  # In the second epoch, within a step that is not its last, with windows of one and of four.


class FastCell(Cell):
    """A rate at which a step is more than the last bit of a bfloat16."""

    @property
    def lr(self) -> float:
        return 0.05


@each_entry
def test_bf16_true(entry: Entry) -> None:
    cell = FastCell(turn(entry, "automatic", "manual", "two"), "32-true", "single", "4short")
    hand = reference_variants.Half(cell, entry).run()
    outcome = fit(entry, cell, precision="bf16-true").outcome
    assert {weight.dtype for weight in outcome.final.values()} == {torch.bfloat16}
    assert outcome.seen == hand.seen
    for what in ("raw", "final"):
        assert distance(getattr(outcome, what), getattr(hand, what)) <= BF16_TOLERANCE, what
    assert outcome.validations == pytest.approx(hand.validations, abs=10 * BF16_TOLERANCE)
    without = reference_variants.Half(cell, replace(entry, formula=entry.without)).run()
    for what in set(SHOWS[entry.acts]) & {"raw", "final"}:
        assert distance(getattr(hand, what), getattr(without, what)) >= EFFECT * BF16_TOLERANCE, what


def distance(one: Weights, other: Weights) -> float:
    """The mean over all elements of ``|a - b| / (1 + |b|)``."""
    assert one.keys() == other.keys()
    parts = [((one[name].float() - b.float()).abs() / (1 + b.float().abs())).flatten() for name, b in other.items()]
    return float(torch.cat(parts).mean())


class Fused:
    """A fused optimizer, and a first loss that is infinite in one batch."""

    def configure_optimizers(self: Any) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=self.cell.lr, momentum=MOMENTUM, fused=True) for net in self.nets]

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        return loss if loss is None else self.perhaps_infinite(loss)

    def optimize(self: Any, loss: Tensor, optimizer: Any) -> None:
        first = optimizer.optimizer is self.trainer.optimizers[0]
        super().optimize(self.perhaps_infinite(loss) if first else loss, optimizer)  # type: ignore[misc]

    def perhaps_infinite(self: Any, loss: Tensor) -> Tensor:
        return loss * float("inf") if self.seen - 1 == INFINITE else loss


@each_entry
@pytest.mark.parametrize(("kind", "windows"), [("automatic", "1"), ("manual", "4short"), ("two", "4short")])
def test_fused_with_an_infinity(entry: Entry, kind: Any, windows: Any) -> None:
    cell = Cell(kind, "16-mixed", "single", windows)
    hand = reference_variants.Infinite(cell, entry, batch=INFINITE)
    expected = hand.run()
    fitted = fit(entry, cell, Fused)
    assert_equal(fitted.outcome, expected, cell)
    assert all(callback.steps == hand.steps for callback in fitted.ours), "the skipped step was counted"
    assert hand.skipped == 1
    plain = reference_variants.Infinite(cell, replace(entry, formula=entry.without), batch=INFINITE).run()
    assert_effect(entry, expected, plain, cell)
    assert fitted.trainer.precision_plugin.scaler.get_scale() == hand.scale


def assert_equal(outcome: Outcome, hand: Outcome, cell: Cell) -> None:
    assert outcome.seen == hand.seen
    for what in ("raw", "final"):
        assert max(deviation(getattr(outcome, what), getattr(hand, what)).values()) <= cell.tolerance, what
    assert outcome.validations == pytest.approx(hand.validations, rel=cell.value_tolerance, abs=cell.value_tolerance)


def test_a_fused_optimizer_is_as_before_the_fit() -> None:
    fitted = fit(BY_NAME["clip_norm"], replace(CELL, precision="16-mixed"), Fused)
    assert fitted.trainer.optimizers[0]._step_supports_amp_scaling
