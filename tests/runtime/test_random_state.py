"""Test that the random state is tensors and plain values, and everything on which draws depend."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_optim.runtime.random_state import random_state, set_random_state_


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(3).tolist(), random.random, lambda: np.random.standard_normal(3).tolist()]
)
def test_random_state_is_plain_and_whole(draw: Callable[[], Any], tmp_path: Path) -> None:
    draw()  # an odd number of normal draws leaves one in store
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    set_random_state_(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected
