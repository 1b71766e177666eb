"""Norms: those of all elements, and on shards the same as on whole tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_optim.base.norms import tensor_norms, total_norm
from tests.harness.process_group import Group

NORMS = [0.5, 1.0, 2.0, 3.0, math.inf]


@pytest.mark.parametrize("p", NORMS)
def test_total_norm_is_that_of_all_elements(p: float) -> None:
    parts = [torch.randn(3, 4), torch.randn(()), torch.randn(0), torch.randn(7)]
    everything = torch.cat([part.flatten() for part in parts])
    torch.testing.assert_close(total_norm(parts, p), torch.linalg.vector_norm(everything, p))


def test_total_norm_of_nothing_is_zero() -> None:
    assert total_norm([]).item() == 0.0
    assert [total_norm([torch.ones(0)], p).item() for p in (1.0, 2.0, math.inf)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_total_norm_of_half_precision_is_summed_in_fp32(dtype: torch.dtype, p: float) -> None:
    parts = [torch.randn(3000).to(dtype), torch.randn(40, 50).to(dtype)]
    exact = torch.linalg.vector_norm(torch.cat([part.double().flatten() for part in parts]), p)
    norm = total_norm(parts, p)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_total_norm_shows_what_is_not_finite(bad: float) -> None:
    assert not total_norm([torch.ones(3), torch.tensor([1.0, bad])]).isfinite()


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float64), (torch.float32, torch.complex64)]
)
def test_norm_of_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    parts = [torch.tensor([3.0], dtype=dtypes[0]), torch.tensor([4.0], dtype=dtypes[1])]
    assert total_norm(parts).item() == pytest.approx(5.0)
    assert tensor_norms(parts).tolist() == pytest.approx([3.0, 4.0])


# ---- on two processes: five rows are shards of three and two, one row leaves the second rank an empty shard ----


def _mixed() -> tuple[list[Tensor], list[Tensor]]:
    """Whole tensors, and the same as shards, replicas, summands and a plain tensor."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator) for shape in [(5, 3), (1,), (4, 3), (6,), (3, 2), (7,)]]
    uneven, single, columns, replicated, summands, plain = whole
    share = 0.25 if mesh.get_rank() == 0 else 0.75
    placed = [
        distribute_tensor(uneven, mesh, [Shard(0)]),
        distribute_tensor(single, mesh, [Shard(0)]),
        distribute_tensor(columns, mesh, [Shard(1)]),
        distribute_tensor(replicated, mesh, [Replicate()]),
        DTensor.from_local(share * summands, mesh, [Partial()]),
        plain,
    ]
    return whole, placed


def _norms_of_mixed() -> list[tuple[float, float]]:
    whole, placed = _mixed()
    return [(total_norm(placed, p).item(), total_norm(whole, p).item()) for p in NORMS]


def _norms_of_hybrid() -> list[tuple[float, float]]:
    """Sharded in one dimension of the mesh and replicated in the other, as hybrid FSDP does it."""
    whole = torch.arange(15.0).view(5, 3)
    pairs = []
    for shape in ((1, 2), (2, 1)):
        placed = distribute_tensor(whole, init_device_mesh("cpu", shape), [Replicate(), Shard(0)])
        pairs += [(total_norm([placed], p).item(), total_norm([whole], p).item()) for p in NORMS]
    return pairs


@pytest.mark.parametrize("job", [_norms_of_mixed, _norms_of_hybrid])
def test_total_norm_is_exact_over_shards_on_every_rank(group: Group, job) -> None:
    first, second = group.run(job)
    assert first == second
    for got, wanted in first:
        assert got == pytest.approx(wanted, rel=1e-6)
