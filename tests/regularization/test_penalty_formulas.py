"""All penalties: value and gradient are those of autograd on the formula, also on shards."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_optim import L1, L2, ElasticNet, GroupLasso, Linear, Orthogonal, Penalty, WeightRegularization
from lightning_optim.base import shards
from tests.harness.operators import Operators
from tests.harness.process_group import Group
from tests.lightning import BoringModel, MisconfigurationException, Trainer

Formula = Callable[[Tensor], Tensor]


def group_norms(dim: int, scale_by_size: bool = False) -> Formula:
    """Return the sum over rows or columns of their norms, one by one."""

    def formula(weight: Tensor) -> Tensor:
        groups = [weight] if weight.ndim < 2 else weight.unbind(dim)
        factors = [math.sqrt(group.numel()) if scale_by_size else 1.0 for group in groups]
        norms = [factor * torch.linalg.vector_norm(group) for factor, group in zip(factors, groups, strict=True)]
        return torch.stack(norms).sum() if norms else weight.real.sum()

    return formula


def gram(weight: Tensor) -> Tensor:
    """Return the squared distance of the products of rows, or of columns if they are fewer, from the identity."""
    matrix = weight.reshape(1, -1) if weight.ndim < 2 else weight.flatten(1)
    matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.mH
    total = weight.real.sum() * 0.0
    for i, row in enumerate(matrix):
        for j, other in enumerate(matrix):
            total = total + ((row * other.conj()).sum() - float(i == j)).abs().square()
    return total


def quartic(weight: Tensor) -> Tensor:
    return weight.abs().pow(4).sum()


CASES: list[tuple[Penalty, Formula]] = [
    (L1(0.3), lambda w: 0.3 * w.abs().sum()),
    (L2(0.3), lambda w: 0.3 * w.abs().square().sum()),
    (ElasticNet(0.3, 0.2), lambda w: 0.3 * w.abs().sum() + 0.2 * w.abs().square().sum()),
    (Orthogonal(0.3), lambda w: 0.3 * gram(w)),
    (Penalty.from_function(quartic, 0.3), lambda w: 0.3 * quartic(w)),
    (GroupLasso(0.3), lambda w: 0.3 * group_norms(0)(w)),
    (GroupLasso(0.3, dim=1), lambda w: 0.3 * group_norms(1)(w)),
    (GroupLasso(0.3, scale_by_size=True), lambda w: 0.3 * group_norms(0, True)(w)),
    (GroupLasso(0.3, dim=1, scale_by_size=True), lambda w: 0.3 * group_norms(1, True)(w)),
]
SHAPES = [(), (5,), (1, 1), (4, 3), (3, 4), (2, 3, 5), (3, 2, 2, 4), (5, 2, 3, 3), (0, 3), (3, 0)]
cases = pytest.mark.parametrize(
    ("penalty", "formula"), CASES, ids=lambda case: repr(case) if isinstance(case, Penalty) else ""
)


def weights_of(dtype: torch.dtype) -> list[Tensor]:
    """Make weights of all shapes, one with a zero row and column, one that is zero, and one that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    weights = [torch.randn(shape, generator=generator, dtype=wide) for shape in SHAPES]
    weights[3][1], weights[4][:, 2] = 0.0, 0.0
    weights += [torch.zeros(2, 3, dtype=wide), torch.randn(3, 6, generator=generator, dtype=wide).t()]
    return [weight.to(dtype) for weight in weights]


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_value_and_gradient_are_those_of_autograd(penalty: Penalty, formula: Formula, dtype: torch.dtype) -> None:
    weights = weights_of(dtype)
    leaves = [weight.detach().requires_grad_() for weight in weights]
    wanted = torch.stack([formula(leaf) for leaf in leaves]).sum()
    slopes = torch.autograd.grad(wanted, leaves)
    torch.testing.assert_close(penalty.value(weights), wanted.detach(), rtol=1e-12, atol=0.0)
    grads = [torch.ones_like(weight) for weight in weights]
    penalty.add_grad_(weights, grads)
    for grad, slope in zip(grads, slopes, strict=True):
        torch.testing.assert_close(grad - 1.0, slope, rtol=1e-11, atol=1e-12)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_right_to_rounding(penalty: Penalty, formula: Formula, dtype: torch.dtype) -> None:
    weights = [*weights_of(dtype), torch.randn(700, 600).to(dtype)]
    exact = [weight.double() for weight in weights]
    assert penalty.value(weights).dtype == torch.float32
    assert penalty.value(weights).item() == pytest.approx(penalty.value(exact).item(), rel=1e-4)
    for of_grads in (dtype, torch.float32):
        grads = [torch.ones_like(weight, dtype=of_grads) for weight in weights]
        exact_grads = [torch.ones_like(weight) for weight in exact]
        penalty.add_grad_(weights, grads)
        penalty.add_grad_(exact, exact_grads)
        for grad, exact_grad in zip(grads, exact_grads, strict=True):
            factor, largest = (2 if of_grads is dtype else 16), exact_grad.abs().max() if exact_grad.numel() else 0.0
            bound = factor * torch.finfo(of_grads).eps * exact_grad.abs().clamp(min=1.0) + 1e-6 * largest
            assert ((grad.double() - exact_grad).abs() <= bound).all()


@cases
def test_nothing_to_penalize(penalty: Penalty, formula: Formula) -> None:
    penalty.add_grad_([], [])
    assert penalty.value([]).item() == 0.0


@cases
def test_stacked_members_are_penalized_each_by_itself(penalty: Penalty, formula: Formula) -> None:
    for shape in ((4, 3), (3,), (2, 3, 2, 2)):
        members = torch.randn(3, *shape, dtype=torch.float64)
        stacked = nn.Parameter(members.clone())
        stacked.member_dim = 0  # type: ignore[attr-defined]
        together, alone = torch.zeros_like(members), torch.zeros_like(members)
        penalty.add_grad_([stacked], [together])
        penalty.add_grad_(list(members), list(alone))
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(penalty.value([stacked]).detach(), penalty.value(list(members)))


def errors_on_shards() -> list[float]:
    """Return the errors of values and gradients of shards against whole tensors, for each penalty."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    placed_how: list[tuple[tuple[int, ...], Placement | None]] = [
        *(((5, 3), Shard(0)), ((1,), Shard(0)), ((4, 3), Shard(1)), ((6,), Replicate()), ((7,), None)),
        *(((3, 4, 2, 2), Shard(0)), ((3, 4, 2, 2), Shard(1)), ((1, 4), Shard(0)), ((4, 4), None), ((7,), Shard(0))),
    ]
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in placed_how]
    whole[0][1], whole[2][:, 1] = 0.0, 0.0
    pairs = zip(whole, placed_how, strict=True)
    placed = [weight if how is None else distribute_tensor(weight, mesh, [how]) for weight, (_, how) in pairs]
    far = []
    for penalty, _ in CASES:
        grads, placed_grads = [torch.ones_like(w) for w in whole], [torch.ones_like(w) for w in placed]
        penalty.add_grad_(whole, grads)
        penalty.add_grad_(placed, placed_grads)
        far.append((penalty.value(placed) / penalty.value(whole) - 1.0).abs().item())
        far += [(shards.gather_to_cpu(g) - w).abs().max().item() for g, w in zip(placed_grads, grads, strict=True)]
    return far


def error_on_twice_cut_shards() -> float:
    """Return the error of column norms where tensor parallelism and FSDP2 cut the same dimension of a weight."""
    mesh = init_device_mesh("cpu", (2, 1))
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = weight[2 * dist.get_rank() :][:2].contiguous()
    placed = DTensor.from_local(half, mesh, [_StridedShard(0, split_factor=1), Shard(0)], run_check=False)
    penalty, grad, wanted = GroupLasso(0.3, dim=1), torch.zeros_like(placed), torch.zeros_like(weight)
    penalty.add_grad_([weight], [wanted])
    penalty.add_grad_([placed], [grad])
    far = (grad.to_local() - wanted[2 * dist.get_rank() :][:2]).abs().max()
    return max(far.item(), (penalty.value([placed]) - penalty.value([weight])).abs().item())


def test_exact_on_twice_cut_shards(group: Group) -> None:
    assert max(group.run(error_on_twice_cut_shards)) < 1e-12


def test_exact_on_shards(group: Group) -> None:
    first, second = group.run(errors_on_shards)
    assert len(first) == 11 * len(CASES)
    assert max(first + second) < 1e-12


def test_a_schedule_scales_the_penalty() -> None:
    weight, grads = torch.randn(4, 3), [torch.zeros(4, 3), torch.zeros(4, 3)]
    GroupLasso(Linear(1.0, 0.0)).add_grad_([weight], [grads[0]], step=1, total=3)
    GroupLasso(0.5).add_grad_([weight], [grads[1]])
    assert torch.equal(*grads)
    GroupLasso(Linear(1.0, 0.0)).add_grad_([weight], [grads[0]], step=2, total=3)
    assert torch.equal(*grads)


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_groups_need_no_temporary_of_the_size_of_the_model(dim: int, dtype: torch.dtype) -> None:
    weight, grad = torch.ones(2000, 500, dtype=dtype), torch.zeros(2000, 500, dtype=dtype)
    with Operators() as operators:
        GroupLasso(0.1, dim=dim).add_grad_([weight], [grad])  # type: ignore[arg-type]
    assert operators.peak <= 300_000


class Looking(BoringModel):
    """Module with an embedding whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 32, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table(torch.tensor([1, 4, 1])).sum(0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_rows_that_are_looked_up_are_groups() -> None:
    ends = []
    for terms in ([], [WeightRegularization(GroupLasso(0.5, on="table.*"))]):
        torch.manual_seed(0)
        model = Looking()
        start = model.table.weight.detach().clone()
        Trainer(max_steps=1, barebones=True, callbacks=terms).fit(model)
        ends.append(model.table.weight.detach())
    rows = start / start.norm(dim=1, keepdim=True)
    expected = torch.zeros(6, 32)
    expected[[1, 4]] = 0.1 * 0.5 * rows[[1, 4]]
    torch.testing.assert_close(ends[0] - ends[1], expected, rtol=1e-4, atol=1e-6)


def test_columns_of_looked_up_rows_are_refused() -> None:
    model = Looking()
    trainer = Trainer(max_steps=1, barebones=True, callbacks=[WeightRegularization(GroupLasso(0.5, dim=1))])
    before = model.layer.weight.detach().clone()
    with pytest.raises(MisconfigurationException, match=r"sparse gradient.*exclude="):
        trainer.fit(model)
    assert torch.equal(model.layer.weight, before)


# ---- functions -------------------------------------------------------------------------------------------------------


def correlations(weight: Tensor) -> Tensor:
    """Return the mean absolute cosine of all pairs of rows, as Keras's ``OrthogonalRegularizer`` does."""
    rows = nn.functional.normalize(weight.flatten(1), dim=1)
    return (rows @ rows.mT).triu(1).abs().sum() / (len(rows) * (len(rows) - 1) / 2)


class Bounded:
    """A function that is an object with an argument."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def __call__(self, weight: Tensor) -> Tensor:
        return (weight.abs() - self.bound).clamp(min=0.0).square().sum()


def test_a_function_has_the_value_of_keras() -> None:
    """``keras.regularizers.OrthogonalRegularizer(0.1, mode="rows")`` of Keras 3.15.1 returns this number."""
    weight = torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, 3.0]])
    penalty = Penalty.from_function(correlations, 0.1)
    assert penalty.value([weight]).item() == pytest.approx(0.047809, abs=5e-7)


def test_a_function_prints_pickles_and_copies() -> None:
    penalty = Penalty.from_function(correlations, strength=Linear(0.1, 0.0), exclude="head.*")
    text = "Penalty.from_function(correlations, strength=Linear(0.1, 0.0), exclude='head.*')"
    assert repr(penalty) == text
    assert repr(eval(text)) == text
    for other in (pickle.loads(pickle.dumps(penalty)), copy.deepcopy(penalty)):
        assert repr(other) == text
        assert other.identity == penalty.identity
        weight = torch.randn(3, 4)
        assert torch.equal(other.value([weight], total=3), penalty.value([weight], total=3))
    assert b"regularization.penalties" not in pickle.dumps(penalty, protocol=2)
    assert Penalty.from_function(Bounded(0.1)).identity == Penalty.from_function(Bounded(0.2)).identity
    assert penalty.identity != Penalty.from_function(quartic, exclude="head.*").identity


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (correlations, "correlations"),
        (functools.partial(quartic), "quartic"),
        (Bounded(0.1), "bounded"),
        (lambda w: w.square().sum(), "function"),
    ],
)
def test_a_function_is_logged_under_its_name(f: Formula, name: str) -> None:
    model = BoringModel()
    terms = [Penalty.from_function(f, 0.1), L2(0.1), Penalty.from_function(f, 0.2)]
    trainer = Trainer(
        max_steps=2,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[WeightRegularization(terms)],
    )
    trainer.fit(model)
    found = [key for key in trainer.callback_metrics if key.startswith("regularization/")]
    assert found == [f"regularization/{name}", "regularization/l2", f"regularization/{name}_2"]


@pytest.mark.parametrize(
    ("f", "sentence"),
    [
        (lambda w: w.square(), r"must return a real scalar tensor.*of shape \(2, 3\), got a tensor of shape \(2, 3\)"),
        (lambda w: w.square().sum().item(), r"must return a real scalar tensor.*got 6.0"),
        (lambda w: w.to(torch.complex64).sum(), "got a complex number"),
        (lambda w: None, "got None"),
        (lambda w: (w.abs() > 0.1).float().sum(), "depends on the weight, by operations that autograd follows"),
        (lambda w: torch.ones((), requires_grad=True) * 2, "depends on the weight"),
    ],
)
def test_a_function_without_a_scalar_or_a_gradient_is_refused(f: Formula, sentence: str) -> None:
    grad = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=sentence):
        Penalty.from_function(f).add_grad_([torch.ones(2, 3)], [grad])
    assert not grad.any()


@pytest.mark.parametrize(("arguments", "argument"), [((3,), "f"), ((quartic, -1.0), "strength")])
def test_wrong_arguments(arguments: tuple, argument: str) -> None:
    with pytest.raises(ValueError, match=rf"^`{argument}` must be .*, got"):
        Penalty.from_function(*arguments)
