"""Names that examples in docstrings and in the docs use without an import: torch's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(math=math, torch=torch, nn=torch.nn, Tensor=torch.Tensor)
