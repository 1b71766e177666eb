"""What all tests share: one thread, a quiet Lightning, and the group of two processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from tests.machine import groups

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def group() -> Iterator[groups.Group]:
    """Two processes of one gloo group, which live as long as the tests."""
    with groups.Group(2) as pair:
        yield pair


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the server of the group import its modules while the first tests run."""
    if any("group" in getattr(item, "fixturenames", ()) for item in items):
        groups.start_server()
