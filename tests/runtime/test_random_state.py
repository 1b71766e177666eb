"""Test that the random state is tensors and plain values, and everything on which draws depend."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_optim.runtime.random_state import isolated_random_state, random_state, set_random_state_


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(3).tolist(), random.random, lambda: np.random.standard_normal(3).tolist()]
)
def test_random_state_is_plain_and_whole(draw: Callable[[], Any], tmp_path: Path) -> None:
    draw()  # an odd number of normal draws leaves one in store
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    set_random_state_(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


def test_an_isolated_draw_changes_nothing_even_if_it_fails() -> None:
    before = random_state()
    expected = torch.rand(3).tolist(), random.random(), np.random.standard_normal(3).tolist()
    set_random_state_(before)
    with pytest.raises(ValueError, match="as planned"), isolated_random_state():
        draws = torch.rand(3), random.random(), np.random.standard_normal(3)
        raise ValueError(f"as planned, after {draws}")
    assert (torch.rand(3).tolist(), random.random(), np.random.standard_normal(3).tolist()) == expected
