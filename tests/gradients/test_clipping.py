"""ClipByNorm and ClipByValue: equal to torch's own functions, and exact on shards."""

from __future__ import annotations

import math

import jsonargparse
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lightning_optim.base import shards
from lightning_optim.base.norms import total_norm
from lightning_optim.base.schedules import Linear
from lightning_optim.gradients.clipping.by_norm import ClipByNorm
from lightning_optim.gradients.clipping.by_value import ClipByValue
from lightning_optim.gradients.clipping.clipping_policy import Clipping
from tests.harness.process_group import Group
from tests.harness.yaml_parsing import instantiate


def _grads(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in [(4, 3), (7,), (), (2, 3, 2)]]


def _parameters(grads: list[Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return parameters


def test_by_norm_on_three_numbers() -> None:
    grads = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    norm = ClipByNorm(2.0).clip_(grads)
    assert norm.item() == 5.0
    assert [grad.item() for grad in grads] == pytest.approx([1.2, 1.6], rel=1e-6)


def test_by_value_on_three_numbers() -> None:
    grad = torch.tensor([-3.0, -0.5, 0.0, 0.4, math.inf])
    ClipByValue(0.5).clip_([grad])
    assert grad.tolist() == pytest.approx([-0.5, -0.5, 0.0, 0.4, 0.5])


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_by_norm_is_that_of_torch(norm_type: float, scale: float, dtype: torch.dtype) -> None:
    grads = _grads(scale, dtype)
    parameters = _parameters(grads)
    wanted = clip_grad_norm_(parameters, 1.5, norm_type)
    norm = ClipByNorm(1.5, norm_type).clip_(grads)
    assert torch.equal(norm, wanted)
    assert all(torch.equal(grad, parameter.grad) for grad, parameter in zip(grads, parameters, strict=True))


@pytest.mark.parametrize("value", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_value_is_that_of_torch(value: float, dtype: torch.dtype) -> None:
    grads = _grads(dtype=dtype)
    parameters = _parameters(grads)
    clip_grad_value_(parameters, value)
    ClipByValue(value).clip_(grads)
    assert all(torch.equal(grad, parameter.grad) for grad, parameter in zip(grads, parameters, strict=True))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("scale", [0.01, 1.0, 1e6])
def test_the_norm_afterwards_is_at_most_the_bound_and_the_direction_is_kept(norm_type: float, scale: float) -> None:
    grads, before = _grads(scale), _grads(scale)
    norm = ClipByNorm(1.0, norm_type).clip_(grads)
    after = total_norm(grads, norm_type)
    assert after <= 1.0 + 1e-6
    torch.testing.assert_close(after, norm.clamp(max=1.0), rtol=1e-3, atol=0.0)
    for grad, old in zip(grads, before, strict=True):
        torch.testing.assert_close(grad * norm.clamp(min=1.0), old, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("policy", [ClipByNorm(0.5), ClipByValue(0.5)], ids=repr)
def test_the_order_of_the_list_does_not_matter(policy: Clipping) -> None:
    grads, reverse = _grads(), _grads()
    policy.clip_(grads)
    policy.clip_(reverse[::-1])
    for grad, other in zip(grads, reverse, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_an_fp32_norm_and_one_rounding(dtype: torch.dtype) -> None:
    grads = _grads(10.0, dtype)
    exact = [grad.double() for grad in grads]
    norm, exact_norm = ClipByNorm(1.0).clip_(grads), ClipByNorm(1.0).clip_(exact)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact_norm.item(), rel=1e-6)
    for grad, exact_grad in zip(grads, exact, strict=True):
        assert grad.dtype == dtype
        bound = 0.51 * torch.finfo(dtype).eps * exact_grad.abs() + torch.finfo(dtype).smallest_normal
        assert ((grad.double() - exact_grad).abs() <= bound).all()


def test_a_norm_that_is_known_is_used_and_returned() -> None:
    grads = [torch.tensor([3.0, 4.0])]
    known = torch.tensor(10.0)
    assert ClipByNorm(1.0).clip_(grads, norm=known) is known
    torch.testing.assert_close(grads[0], torch.tensor([0.3, 0.4]))
    assert ClipByValue(0.1).clip_(grads, norm=known) is known


def test_by_value_computes_no_norm() -> None:
    assert ClipByValue(0.1).clip_([torch.ones(2)]) is None


def test_by_norm_of_infinity_only_measures() -> None:
    grads, before = _grads(), _grads()
    norm = ClipByNorm(math.inf).clip_(grads)
    torch.testing.assert_close(norm, total_norm(before))
    assert all(torch.equal(grad, old) for grad, old in zip(grads, before, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_gradients_stay_nonfinite(bad: float) -> None:
    grads = [torch.tensor([1.0, bad])]
    norm = ClipByNorm(1.0).clip_(grads)
    assert not norm.isfinite()
    assert grads[0][1].isnan()


def test_without_gradients() -> None:
    assert ClipByNorm(1.0).clip_([]).item() == 0.0
    assert ClipByValue(1.0).clip_([]) is None


def test_gradients_of_zero_stay_zero() -> None:
    grads = [torch.zeros(3)]
    assert ClipByNorm(1.0).clip_(grads).item() == 0.0
    assert grads[0].tolist() == [0.0] * 3


@pytest.mark.parametrize(("step", "bound"), [(0, 4.0), (1, 2.5), (2, 1.0)])
def test_schedules(step: int, bound: float) -> None:
    by_norm, by_value = [torch.tensor([30.0, 40.0])], [torch.tensor([30.0, -40.0])]
    ClipByNorm(Linear(4.0, 1.0)).clip_(by_norm, step=step, total=3)
    ClipByValue(Linear(4.0, 1.0)).clip_(by_value, step=step, total=3)
    assert by_norm[0].norm().item() == pytest.approx(bound, rel=1e-6)
    assert by_value[0].tolist() == [bound, -bound]


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: ClipByNorm(0.0), r"`max_norm` must be a number \(or a schedule of them\) > 0.0, got 0.0"),
        (lambda: ClipByNorm(math.nan), "`max_norm` must be .*, got nan"),
        (lambda: ClipByNorm(True), "`max_norm` must be .*, got True"),
        (lambda: ClipByNorm(Linear(1.0, 0.0)), r"`max_norm` must be .*, got Linear\(1.0, 0.0\)"),
        (lambda: ClipByNorm(1.0, norm_type=0), "`norm_type` must be a number > 0.0, got 0"),
        (lambda: ClipByNorm(1.0, norm_type="inf"), "`norm_type` must be a number > 0.0, got 'inf'"),
        (lambda: ClipByNorm(1.0, norm_type=Linear(1.0, 2.0)), "`norm_type` must be a number > 0.0, got Linear"),
        (lambda: ClipByValue(-1.0), r"`value` must be a number \(or a schedule of them\) > 0.0, got -1.0"),
    ],
)
def test_refused(build, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


def test_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=float | Clipping | list[Clipping])
    text = "{class_path: lightning_optim.ClipByNorm, init_args: {max_norm: 2, norm_type: .inf}}"
    policy = instantiate(parser, parser.parse_args([f"--policy={text}"])).policy
    assert isinstance(policy, ClipByNorm)
    assert (policy.max_norm, policy.norm_type) == (2, math.inf)
    assert parser.parse_args(["--policy=0.5"]).policy == 0.5


def _on_shards() -> list[float]:
    """Return the errors of clipped shards, replicas and plain tensors against clipped whole tensors."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator) for shape in [(5, 3), (1,), (4, 3), (6,), (7,)]]
    placements = [Shard(0), Shard(0), Shard(1), Replicate()]
    far = []
    for policy in (ClipByNorm(1.0), ClipByNorm(1.0, 1.0), ClipByNorm(0.5, math.inf), ClipByValue(0.3)):
        grads = [grad.clone() for grad in whole]
        placed = [distribute_tensor(g.clone(), mesh, [p]) for g, p in zip(grads[:4], placements, strict=True)]
        placed += [grad.clone() for grad in grads[4:]]
        norm, wanted = policy.clip_(placed), policy.clip_(grads)
        far += [] if wanted is None else [(norm / wanted - 1.0).abs().item()]
        far += [(shards.gather_to_cpu(g) - w).abs().max().item() for g, w in zip(placed, grads, strict=True)]
    return far


def test_exact_on_shards(group: Group) -> None:
    first, second = group.run(_on_shards)
    assert len(first) == 23
    assert max(first + second) < 1e-6
