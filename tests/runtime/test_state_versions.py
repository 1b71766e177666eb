"""States of callbacks carry the version of their layout; earlier ones are converted, later ones refused."""

from __future__ import annotations

import pytest

from lightning_optim import EarlyStopping, GradientClipping, OptimCallback, Plateau
from lightning_optim.runtime.state_versions import VERSION


class Counting(OptimCallback):
    seen = 0

    def extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_extra_state(self, extra: dict[str, int]) -> None:
        self.loaded = dict(extra)
        self.seen = extra["seen"]


@pytest.mark.parametrize("callback", [Counting(), GradientClipping(1.0), EarlyStopping(Plateau("a"))], ids=repr)
def test_a_state_has_the_version_of_its_layout(callback: OptimCallback) -> None:
    assert callback.state_dict()["state_version"] == VERSION


def test_a_subclass_does_not_see_the_version() -> None:
    one, other = Counting(), Counting()
    one.seen, one.steps = 3, [5]
    other.load_state_dict(one.state_dict())
    assert (other.loaded, other.seen, other.steps) == ({"seen": 3}, 3, [5])


def test_a_state_without_a_version_is_the_first() -> None:
    callback = Counting()
    callback.load_state_dict({"steps": [2], "seen": 7})
    assert (callback.seen, callback.steps) == (7, [2])


def test_a_later_version_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"Counting\(\) in version {VERSION + 1}.*versions up to {VERSION}"):
        Counting().load_state_dict({"state_version": VERSION + 1, "steps": [2], "seen": 7})
