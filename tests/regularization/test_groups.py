"""Norms and sizes of the rows and columns of weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_optim.regularization.groups import group_factor, group_norms


def groups(weight: Tensor, dim: int) -> list[Tensor]:
    """Return the groups of a tensor, one by one."""
    return [weight] if weight.ndim < 2 else list(weight.unbind(dim))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(), (5,), (0,), (4, 3), (2, 3, 5), (3, 2, 2, 4), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex128])
def test_of_each_row_or_column(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    (norms,) = group_norms([weight], dim)
    parts = groups(weight, dim)
    wanted = torch.tensor([part.to(torch.complex128).abs().square().sum().sqrt() for part in parts])
    torch.testing.assert_close(
        norms.flatten().double(), wanted.double(), rtol=1e-3 if dtype.itemsize < 4 else 1e-12, atol=0.0
    )
    assert norms.dtype == (torch.float32 if dtype.itemsize < 4 else torch.float64)
    assert (norms * weight).shape == weight.shape
    assert all(math.sqrt(part.numel()) == group_factor(weight, dim, scale_by_size=True) for part in parts)
    assert group_factor(weight, dim) == 1.0


def test_stacked_members_have_groups_of_their_own() -> None:
    members = torch.randn(2, 4, 3)
    stacked = torch.nn.Parameter(members.clone())
    stacked.member_dim = 0  # type: ignore[attr-defined]
    for dim, size in ((0, 3), (1, 4)):
        norms = torch.stack([group_norms([member], dim)[0] for member in members])
        torch.testing.assert_close(group_norms([stacked], dim)[0].detach(), norms)
        assert group_factor(stacked, dim, scale_by_size=True) == math.sqrt(size)
