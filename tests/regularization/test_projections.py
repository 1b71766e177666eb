"""Projections of rows, columns and signs: their formulas, edge cases, and what they do within a fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import (
    Linear,
    MaxNorm,
    NonNegative,
    Proximal,
    ProximalGroupLasso,
    ProximalL1,
    UnitNorm,
    WeightRegularization,
    sparsity,
)
from tests.lightning import BoringModel, MisconfigurationException, Trainer

SHAPES = [(4, 3), (4, 3, 2), (4, 3, 2, 2)]
PROJECTIONS = [ProximalL1(2.0), ProximalGroupLasso(2.0), MaxNorm(0.5), UnitNorm(), NonNegative()]


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def projected(term: Proximal, weight: Tensor, lr: float = 0.1) -> Tensor:
    weight = weight.clone()
    term.project_([weight], lr=lr)
    return weight


def groups(weight: Tensor, dim: int) -> Tensor:
    """Return the groups as the rows of a matrix."""
    return weight.transpose(0, dim).flatten(1)


# ---- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_group_lasso_is_the_minimizer_of_distance_and_penalty(shape: tuple[int, ...], dim: int) -> None:
    """The gradient of ``|x - w|^2 / 2 + t |x|`` is zero where x is not, and elsewhere w is within the threshold."""
    weight, lr, strength = randn(*shape), 0.1, 20.0
    found = projected(ProximalGroupLasso(strength, dim), weight, lr)
    zero = 0
    for x, w in zip(groups(found, dim), groups(weight, dim), strict=True):
        if x.norm():
            assert torch.allclose(x - w + lr * strength * x / x.norm(), torch.zeros_like(x), atol=1e-12)
        else:
            zero += 1
            assert w.norm() <= lr * strength
    assert zero > 0 or shape != (4, 3)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_threshold_may_grow_with_the_size_of_a_group(shape: tuple[int, ...], dim: int) -> None:
    weight = randn(*shape)
    size = groups(weight, dim).shape[1]
    scaled = projected(ProximalGroupLasso(3.0, dim, scale_by_size=True), weight)
    assert torch.allclose(scaled, projected(ProximalGroupLasso(3.0 * math.sqrt(size), dim), weight), rtol=1e-12)
    assert not torch.allclose(scaled, projected(ProximalGroupLasso(3.0, dim), weight))


def test_the_soft_threshold_before_that_of_groups_is_the_sparse_group_lasso() -> None:
    """The gradient of ``|x - w|^2 / 2 + a sum|x| + b |x|`` is zero where x is not. In the other order it is not."""
    weight, a, b = randn(4, 30), 0.3, 1.0
    found = projected(ProximalGroupLasso(b), projected(ProximalL1(a), weight, lr=1.0), lr=1.0)
    slope = found - weight + a * found.sign() + b * nn.functional.normalize(found, dim=1)
    kept = found != 0.0
    assert 0.5 < kept.float().mean() < 0.9
    assert torch.allclose(slope[kept], torch.zeros_like(slope[kept]), atol=1e-12)
    other = projected(ProximalL1(a), projected(ProximalGroupLasso(b), weight, lr=1.0), lr=1.0)
    assert not torch.allclose(found, other)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_max_norm_is_renorm(shape: tuple[int, ...], dim: int) -> None:
    weight = randn(*shape)
    bound = float(groups(weight, dim).norm(dim=1).mean())
    found = projected(MaxNorm(bound, dim), weight)
    assert torch.allclose(found, torch.renorm(weight, 2, dim, bound), rtol=1e-6)  # renorm adds 1e-7 to the norm
    norms, before = groups(found, dim).norm(dim=1), groups(weight, dim).norm(dim=1)
    assert (norms <= bound * (1 + 1e-12)).all() and (norms < before).any()
    kept = before <= bound
    assert kept.any() and torch.equal(groups(found, dim)[kept], groups(weight, dim)[kept])


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_unit_norm_keeps_directions(shape: tuple[int, ...], dim: int) -> None:
    weight = randn(*shape)
    found = groups(projected(UnitNorm(dim), weight), dim)
    assert torch.allclose(found.norm(dim=1), torch.ones(len(found), dtype=found.dtype), rtol=1e-12)
    assert torch.allclose(nn.functional.cosine_similarity(found, groups(weight, dim)), found.new_ones(len(found)))


def test_norms_are_those_of_keras() -> None:
    """Constants of Keras by hand: ``w * clip(n, 0, c) / (1e-7 + n)``, where Keras numbers outputs last."""
    weight = torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    root5, root14 = math.sqrt(5.0), math.sqrt(14.0)
    wanted = weight * torch.tensor([[2.0 / (1e-7 + root5)], [2.0 / (1e-7 + root14)]])
    assert torch.allclose(projected(MaxNorm(2.0), weight), wanted, rtol=2e-7)
    by_input = torch.tensor([2.0 / (1e-7 + root5), 2.0 / (1e-7 + root5), 2.0 / (1e-7 + 3.0)])
    assert torch.allclose(projected(MaxNorm(2.0, dim=1), weight), weight * by_input, rtol=2e-7)
    unit = weight / torch.tensor([[1e-7 + root5], [1e-7 + root14]])
    assert torch.allclose(projected(UnitNorm(), weight), unit, rtol=2e-7)
    assert projected(NonNegative(), weight).tolist() == [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]


def test_max_norm_follows_its_schedule() -> None:
    weight = torch.tensor([[3.0, 4.0]])
    MaxNorm(Linear(4.0, 1.0)).project_([weight], lr=0.0, step=10, total=11)
    assert weight.norm().item() == pytest.approx(1.0)


# ---- edge cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", [lambda dim: ProximalGroupLasso(2.0, dim), lambda dim: MaxNorm(0.5, dim), UnitNorm])
def test_a_vector_and_a_scalar_are_one_group(kind: Any, dim: int) -> None:
    vector, scalar = torch.tensor([3.0, 4.0]), torch.tensor(-5.0)
    kind(dim).project_([vector, scalar], lr=0.5)
    length = 4.0 if isinstance(kind(dim), ProximalGroupLasso) else 0.5 if isinstance(kind(dim), MaxNorm) else 1.0
    assert vector.tolist() == pytest.approx([0.6 * length, 0.8 * length])
    assert scalar.item() == pytest.approx(-length)


@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize(
    ("term", "dtype"),
    [
        pytest.param(term, dtype, id=f"{term!r}-{dtype}")
        for term in (*PROJECTIONS, ProximalL1(0.0), ProximalGroupLasso(0.0))
        for dtype in (torch.float32, torch.bfloat16, torch.complex64)
        if not (dtype.is_complex and term.needs_real)
    ],
)
def test_zeros_stay_zero_and_empty_weights_stay_empty(term: Proximal, dtype: torch.dtype, lr: float) -> None:
    weights = [torch.zeros(2, 3, dtype=dtype), torch.zeros(0, 3, dtype=dtype), torch.zeros(3, 0, dtype=dtype)]
    term.project_([], lr=lr)
    term.project_(weights, lr=lr)
    assert not torch.cat([weight.flatten() for weight in weights]).any()


@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize("term", [ProximalL1(0.0), ProximalGroupLasso(0.0), ProximalL1(2.0), ProximalGroupLasso(2.0)])
def test_a_threshold_of_zero_changes_nothing(term: Any, lr: float) -> None:
    for weight in (randn(3, 4), randn(3, 4, dtype=torch.complex64)):
        same = torch.equal(projected(term, weight, lr), weight)
        assert same is (lr * term.strength == 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("term", [ProximalGroupLasso(2.0), MaxNorm(0.5), UnitNorm(1)], ids=repr)
def test_half_precision_is_the_rounded_result(term: Proximal, dtype: torch.dtype) -> None:
    """Norms are computed in fp32: 1000 squares of 20 are more than half precision holds."""
    weight = torch.full((4, 1000), 20.0, dtype=dtype)
    wanted = projected(term, weight.double()).to(dtype)
    assert wanted.isfinite().all() and wanted.any()
    assert torch.allclose(projected(term, weight), wanted, rtol=float(torch.finfo(dtype).eps))


@pytest.mark.parametrize("term", [ProximalL1(5.0), ProximalGroupLasso(15.0), MaxNorm(0.5), UnitNorm(1)], ids=repr)
def test_complex_weights_keep_their_directions(term: Proximal) -> None:
    """The size of a complex weight is shortened; a real formula on sizes is the reference."""
    weight = randn(4, 3, dtype=torch.complex128)
    wanted = torch.polar(projected(term, weight.abs()), weight.angle())
    assert torch.allclose(projected(term, weight), wanted, atol=1e-12)


def test_large_complex_weights_are_cut_into_pieces() -> None:
    weight = randn(600, 600, dtype=torch.complex64)
    wanted = torch.polar((weight.abs() - 0.5).clamp_min(0.0), weight.angle())
    assert torch.allclose(projected(ProximalL1(5.0), weight), wanted, atol=1e-6)


@pytest.mark.parametrize("term", PROJECTIONS[1:], ids=repr)
def test_a_weight_that_is_not_finite_is_not_hidden(term: Proximal) -> None:
    assert projected(term, torch.tensor([[math.nan, 1.0], [2.0, 3.0]])).isnan().any()


@pytest.mark.parametrize("term", PROJECTIONS, ids=repr)
def test_any_memory_format(term: Proximal) -> None:
    plain = randn(4, 3, 2, 2)
    wanted = projected(term, plain)
    last = plain.to(memory_format=torch.channels_last)
    term.project_([last], lr=0.1)
    assert torch.allclose(last, wanted, rtol=1e-12)


# ---- within a fit ----------------------------------------------------------------------------------------------------


def fit(model: BoringModel, term: Any) -> BoringModel:
    Trainer(max_steps=5, barebones=True, callbacks=[WeightRegularization(term)]).fit(model)
    return model


@pytest.mark.parametrize(
    ("term", "holds"),
    [
        (MaxNorm(0.1), lambda w: (w.norm(dim=1) <= 0.1 + 1e-6).all()),
        (UnitNorm(dim=1), lambda w: torch.allclose(w.norm(dim=0), torch.ones(32))),
        (NonNegative(), lambda w: (w >= 0).all() and (w == 0).any()),
        (ProximalGroupLasso(0.5, dim=1), lambda w: 0 < (w == 0).all(dim=0).sum() < 32),
    ],
    ids=["max_norm", "unit_norm", "non_negative", "group_lasso"],
)
def test_the_constraint_holds_after_a_fit(term: Any, holds: Any) -> None:
    torch.manual_seed(0)
    assert holds(fit(BoringModel(), term).layer.weight.detach())


def test_whole_outputs_become_zero() -> None:
    torch.manual_seed(0)
    model = fit(BoringModel(), ProximalGroupLasso(100.0))
    assert not model.layer.weight.any()
    assert sparsity(model).share == 1.0


class Rotating(BoringModel):
    """Module with a complex weight, and a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.rotation = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return self(batch).sum() + (self.rotation.abs() ** 2).sum()


def test_complex_weights_have_no_sign() -> None:
    model = Rotating()
    with pytest.raises(MisconfigurationException, match=r"NonNegative\(\) is not defined .*'rotation'.*`exclude=`"):
        fit(model, NonNegative())
    assert model.steps == 0
    fit(model, NonNegative(exclude="rotation"))
    assert (model.layer.weight >= 0).all()
