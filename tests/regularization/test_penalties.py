"""L1, L2 and elastic net: values of Keras, large tensors, schedules, arguments; see also ``test_penalty_formulas``."""

from __future__ import annotations

import jsonargparse
import pytest
import torch
from torch import Tensor, nn

from lightning_optim import L1, L2, ElasticNet, Penalty
from lightning_optim.base.schedules import Linear, Piecewise
from tests.harness.operators import Operators
from tests.harness.yaml_parsing import instantiate

TEXTBOOK = torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, 3.0]])
PENALTIES = [L1(0.1), L2(0.1), ElasticNet(0.1, 0.2)]


@pytest.mark.parametrize(("penalty", "value"), [(L1(0.1), 0.9), (L2(0.1), 1.9), (ElasticNet(0.1, 0.2), 4.7)])
def test_values_of_keras(penalty: Penalty, value: float) -> None:
    assert penalty.value([TEXTBOOK]).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (L1(0.1), [[0.9, 0.9, 1.0], [1.1, 1.1, 1.1]]),
        (L2(0.1), [[0.6, 0.8, 1.0], [1.2, 1.4, 1.6]]),
        (ElasticNet(0.1, 0.2), [[0.1, 0.5, 1.0], [1.5, 1.9, 2.3]]),
    ],
)
def test_gradients_are_added_to_existing_ones(penalty: Penalty, expected: list[list[float]]) -> None:
    grad = torch.ones(2, 3)
    penalty.add_grad_([TEXTBOOK], [grad])
    torch.testing.assert_close(grad, torch.tensor(expected))


def _weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Make small tensors, a scalar, an empty tensor, a non-contiguous view, and two tensors larger than a chunk."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4)] * 20 + [(), (0, 2), (600, 500), (7,), (300_000,)]
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [*weights, torch.randn(700, 600, generator=generator, dtype=torch.float64).to(dtype).t()]


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_the_derivative_of_the_value(penalty: Penalty, dtype: torch.dtype) -> None:
    weights = [weight.requires_grad_() for weight in _weights(dtype)]
    wanted = torch.autograd.grad(penalty.value(weights), weights)
    grads = [torch.zeros_like(weight) for weight in weights]
    penalty.add_grad_(weights, grads)
    for grad, derivative in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, derivative, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_a_list_is_the_sum_of_its_tensors_in_any_order(penalty: Penalty) -> None:
    weights = _weights()
    values = torch.stack([penalty.value([weight]) for weight in weights])
    torch.testing.assert_close(penalty.value(weights), values.sum(), rtol=1e-5, atol=0.0)
    grads = [torch.zeros_like(weight) for weight in weights]
    penalty.add_grad_(weights, grads)
    reverse = [torch.zeros_like(weight) for weight in weights]
    penalty.add_grad_(weights[::-1], reverse[::-1])
    assert all(torch.equal(grad, other) for grad, other in zip(grads, reverse, strict=True))


def test_elastic_net_is_the_sum_of_l1_and_l2() -> None:
    weights = _weights()
    both, one = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    ElasticNet(0.3, 0.7).add_grad_(weights, both)
    L1(0.3).add_grad_(weights, one)
    L2(0.7).add_grad_(weights, one)
    assert all(torch.equal(grad, other) for grad, other in zip(both, one, strict=True))


def test_sgd_weight_decay_is_half_a_strength() -> None:
    penalized, decayed = nn.Parameter(TEXTBOOK.clone()), nn.Parameter(TEXTBOOK.clone())
    penalized.grad, decayed.grad = torch.ones(2, 3), torch.ones(2, 3)
    L2(0.05).add_grad_([penalized], [penalized.grad])
    torch.optim.SGD([penalized], lr=0.1).step()
    torch.optim.SGD([decayed], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(penalized, decayed)


@pytest.mark.parametrize(
    ("penalty", "factors"),
    [
        (L1(Linear(1.0, 0.0)), [1.0, 0.5, 0.0]),
        (L2(Piecewise({0: 0.0, 0.5: 2.0})), [0.0, 2.0, 2.0]),
        (ElasticNet(Linear(0.0, 1.0), Linear(0.0, 1.0)), [0.0, 0.5, 1.0]),
    ],
)
def test_a_schedule_scales_value_and_gradient(penalty: Penalty, factors: list[float]) -> None:
    plain = type(penalty)(*([1.0] * (2 if isinstance(penalty, ElasticNet) else 1)))
    wanted = torch.zeros(2, 3)
    plain.add_grad_([TEXTBOOK], [wanted])
    for step, factor in enumerate(factors):
        grad = torch.zeros(2, 3)
        penalty.add_grad_([TEXTBOOK], [grad], step=step, total=3)
        torch.testing.assert_close(grad, factor * wanted)
        torch.testing.assert_close(penalty.value([TEXTBOOK], step=step, total=3), factor * plain.value([TEXTBOOK]))


@pytest.mark.parametrize("shapes", [[(1_000_000,)], [(500, 100)] * 20], ids=["one large", "many small"])
def test_no_temporary_has_the_size_of_the_model(shapes: list[tuple[int, ...]]) -> None:
    weights, grads = [torch.ones(shape) for shape in shapes], [torch.zeros(shape) for shape in shapes]
    with Operators() as naive:
        torch._foreach_add_(grads, torch._foreach_sign(weights))
    assert naive.peak == 1_000_000
    for penalty in PENALTIES:
        with Operators() as ours:
            penalty.add_grad_(weights, grads)
        assert ours.peak <= 2 << 18


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: L1(-1e-3), r"`strength` must be a number \(or a schedule of them\) >= 0.0, got -0.001"),
        (lambda: L1("1e-3"), "`strength` must be .*, got '1e-3'"),
        (lambda: L2(float("nan")), "`strength` must be .*, got nan"),
        (lambda: L2(float("inf")), "`strength` must be .*, got inf"),
        (lambda: L2(Linear(1.0, -1.0)), r"`strength` must be .*, got Linear\(1.0, -1.0\)"),
        (lambda: ElasticNet(-1.0, 0.0), "`l1` must be .*, got -1.0"),
        (lambda: ElasticNet(0.0, True), "`l2` must be .*, got True"),
    ],
)
def test_refused(build, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('strength: 1e-5, "on": "*"', "L1(strength=1e-05, on='*')"),
        (
            'strength: 1e-5, "on": ["a.*", "b.*"], exclude: "*.bias"',
            "L1(strength=1e-05, on=['a.*', 'b.*'], exclude='*.bias')",
        ),
        (
            "strength: {class_path: lightning_optim.base.schedules.Linear, init_args: {start: 1.0, end: 0.0}}",
            "L1(strength=Linear(1.0, 0.0))",
        ),
    ],
)
def test_from_yaml(arguments: str, shown: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--terms", type=Penalty | list[Penalty])
    text = f"{{class_path: lightning_optim.L1, init_args: {{{arguments}}}}}"
    one = instantiate(parser, parser.parse_args([f"--terms={text}"])).terms
    several = instantiate(parser, parser.parse_args([f"--terms=[{text}, {text}]"])).terms
    assert [type(penalty) for penalty in (one, *several)] == [L1] * 3
    explicit = f"L1(strength={one.strength!r}, on={one.on!r}, exclude={one.exclude!r})"
    assert explicit.replace(", on=None", "").replace(", exclude=None", "") == shown


def squares(weight):
    return weight.square().sum()


def test_a_function_without_type_hints_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--term", type=Penalty)
    arguments = f"{{f: {squares.__module__}.squares, strength: 0.5}}"
    text = f"{{class_path: lightning_optim.Penalty.from_function, init_args: {arguments}}}"
    term = instantiate(parser, parser.parse_args([f"--term={text}"])).term
    assert repr(term) == "Penalty.from_function(squares, strength=0.5)"
    assert term.value([torch.tensor([[1.0, 3.0]])]) == 5.0
