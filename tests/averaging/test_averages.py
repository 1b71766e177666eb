"""Policies of averaging against closed forms in fp64 and other packages, and on shards."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Iterator

import ema_pytorch
import jsonargparse
import pytest
import torch
import torch_ema
from ignite.engine import Engine
from ignite.handlers import EMAHandler
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_optim.averaging.averages.average import Average
from lightning_optim.averaging.averages.ema import EMA
from lightning_optim.averaging.averages.lawa import LAWA
from lightning_optim.averaging.averages.swa import SWA
from lightning_optim.base import foreach, shards
from lightning_optim.base.dtypes import accumulation_dtype
from tests.harness.operators import Operators
from tests.harness.process_group import Group
from tests.harness.yaml_parsing import instantiate


def _closed_form(history: list[Tensor], steps: list[int], decay: float, warmup: float | None) -> Tensor:
    """Return the average as a weighted sum of the weights of all updates, in fp64."""
    kept = [1.0]  # of what was there before, by each update
    for before, step in itertools.pairwise(steps):
        d = decay if warmup is None else min(decay, 1.0 - (1.0 + step - steps[0]) ** (-warmup))
        kept.append(d ** (step - before))
    shares = [1.0] + [1.0 - part for part in kept[1:]]
    factors = [share * math.prod(kept[index + 1 :]) for index, share in enumerate(shares)]
    return sum(factor * weight.double() for factor, weight in zip(factors, history, strict=True))


@pytest.mark.parametrize("warmup", [2 / 3, 0.75, None])
@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("first", [0, 1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form(warmup: float | None, every: int, first: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = list(range(first, first + 30 * every, every))
    history = [torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in steps]
    ema = EMA(0.95, warmup)
    for weight, step in zip(history, steps, strict=True):
        ema.update_([weight], step=step)
    wanted = _closed_form(history, steps, 0.95, warmup).to(dtype)
    torch.testing.assert_close(ema.averaged[0], wanted, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-12)


def test_formulas_on_a_few_numbers() -> None:
    ema = EMA(0.5, warmup=None)
    for step, value in enumerate([1.0, 2.0, 4.0]):
        ema.update_([torch.tensor(value)], step=step)
    assert ema.averaged[0].item() == 0.5 * (0.5 * 1.0 + 0.5 * 2.0) + 0.5 * 4.0


def test_the_first_update_copies_and_shares_no_storage() -> None:
    weight = torch.tensor([1.0, 2.0])
    ema = EMA(0.9)
    assert (ema.averaged, ema.started) == ([], False)
    ema.update_([weight], step=5)
    weight.zero_()
    assert ema.started
    assert ema.averaged[0].tolist() == [1.0, 2.0]


def test_decay_of_the_warmup() -> None:
    assert EMA(0.9999).decay_at(31_600) == pytest.approx(0.999, abs=1e-5)
    assert EMA(0.9999).decay_at(1_000_000) == pytest.approx(0.9999, abs=1e-7)
    assert EMA(0.9999, 3 / 4).decay_at(10_000) == pytest.approx(0.999, abs=1e-5)
    assert EMA(0.9999, 3 / 4).decay_at(215_400) == pytest.approx(0.9999, abs=1e-6)
    assert EMA(0.99).decay_at(100_000) == 0.99
    assert EMA(0.99, None).decay_at(1) == 0.99


@pytest.mark.parametrize("k", [2, 7])
def test_an_update_after_k_steps_is_k_updates_with_weights_that_stand_still(k: int) -> None:
    rare, often = EMA(0.9, warmup=None), EMA(0.9, warmup=None)
    for ema in (rare, often):
        ema.update_([torch.zeros(2)], step=0)
    rare.update_([torch.ones(2)], step=k)
    for step in range(1, k + 1):
        often.update_([torch.ones(2)], step=step)
    torch.testing.assert_close(rare.averaged, often.averaged)


def test_a_repeated_step_changes_nothing_and_an_earlier_one_is_refused() -> None:
    ema = EMA(0.9)
    ema.update_([torch.zeros(1)], step=3)
    ema.update_([torch.ones(1)], step=3)
    assert ema.averaged[0].item() == 0.0
    with pytest.raises(ValueError, match="`step` must not decrease, got 2 after 3"):
        ema.update_([torch.ones(1)], step=2)


# ---- oracles ----


def _trained(model: nn.Module, updates: int = 40) -> Iterator[None]:
    """Return a model and optimizer whose weights move at each step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        yield


def _assert_close(ema: Average, wanted: Iterator[Tensor]) -> None:
    torch.testing.assert_close(ema.averaged, [tensor.detach() for tensor in wanted], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [2 / 3, 0.75])
def test_agrees_with_ema_pytorch(power: float) -> None:
    model = nn.Linear(4, 3)
    theirs = ema_pytorch.EMA(model, beta=0.9, power=power, update_after_step=0, update_every=1)
    ours = EMA(0.9, warmup=power)
    for step, _ in enumerate(_trained(model)):
        theirs.update()
        ours.update_(list(model.parameters()), step=step)
        _assert_close(ours, theirs.ema_model.parameters())


def test_agrees_with_torch_ema() -> None:
    model = nn.Linear(4, 3)
    theirs = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.9, use_num_updates=False)
    ours = EMA(0.9, warmup=None)
    ours.update_(list(model.parameters()), step=0)
    for step, _ in enumerate(_trained(model), start=1):
        theirs.update()
        ours.update_(list(model.parameters()), step=step)
        _assert_close(ours, theirs.shadow_params)


def test_agrees_with_torch() -> None:
    model = nn.Linear(4, 3)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours = EMA(0.9, warmup=None)
    for step, _ in enumerate(_trained(model)):
        theirs.update_parameters(model)
        ours.update_(list(model.parameters()), step=step)
        _assert_close(ours, theirs.parameters())


def test_agrees_with_ignite() -> None:
    model = nn.Linear(4, 3)
    moves = _trained(model)
    engine = Engine(lambda engine, batch: next(moves))
    theirs = EMAHandler(model, momentum=0.1)
    theirs.attach(engine, name="ema_momentum")
    ours = EMA(0.9, warmup=None)
    ours.update_(list(model.parameters()), step=0)
    for step in range(1, 11):
        engine.run([0], max_epochs=step)
        ours.update_(list(model.parameters()), step=step)
        _assert_close(ours, theirs.ema_model.parameters())


def test_swa_agrees_with_torch() -> None:
    model = nn.Linear(4, 3)
    theirs, ours = AveragedModel(model), SWA()
    for step, _ in enumerate(_trained(model)):
        theirs.update_parameters(model)
        ours.update_(list(model.parameters()), step=step)
        _assert_close(ours, theirs.parameters())


# ---- equal weights, the latest, half-lives ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_mean_of_the_last_in_double_precision(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    swa, lawa, history = SWA(), LAWA(size), []
    for step in range(0, 60, 3):
        history.append(torch.randn(5, 3, generator=generator).to(dtype))
        for average in (swa, lawa):
            average.update_([history[-1]], step=step)
        if step % 2:
            continue  # the mean is computed when it is asked for: now and then
        for average, counted in ((swa, history), (lawa, history[-size:])):
            wanted = sum(weight.double() for weight in counted) / len(counted)
            assert average.averaged[0].dtype == accumulation_dtype(history[0].dtype)
            torch.testing.assert_close(average.averaged[0].double(), wanted, rtol=1e-5, atol=1e-6)
    assert swa.counters == lawa.counters == {"updates": 20, "first": 0, "last": 57}
    assert len(lawa.memory) == min(size, 20)


def test_a_half_life_is_a_decay() -> None:
    assert EMA(half_life=1, warmup=None).decay_at(1) == 0.5
    ema = EMA(half_life=10, warmup=None)
    ema.update_([torch.ones(1)], step=0)
    for step in range(1, 21):
        ema.update_([torch.zeros(1)], step=step)
        if step in (10, 20):
            assert ema.averaged[0].item() == pytest.approx(0.5 ** (step / 10), rel=1e-5)
    assert repr(ema) == "EMA(warmup=None, half_life=10)"


@pytest.mark.parametrize("average", [EMA(0.9), SWA(), LAWA(2)], ids=repr)
def test_one_step_counts_once(average: Average) -> None:
    average.update_([torch.zeros(1)], step=3)
    average.update_([torch.ones(1)], step=3)
    assert (average.averaged[0].item(), average.counters["updates"]) == (0.0, 1)
    with pytest.raises(ValueError, match="`step` must not decrease, got 2 after 3"):
        average.update_([torch.ones(1)], step=2)


@pytest.mark.parametrize("average", [EMA(0.5), SWA(), LAWA(2)], ids=repr)
def test_weights_that_join_later_are_averaged_as_if_they_had_stood_still(average: Average) -> None:
    whole, moved, still = copy.deepcopy(average), torch.zeros(2), torch.ones(3)
    for step in range(6):
        if step == 3:
            average.extend([still])
        if step >= 3:
            still += 1.0
        moved += 1.0
        average.update_([moved, still] if step >= 3 else [moved], step=step)
        whole.update_([moved, still], step=step)
    torch.testing.assert_close(average.averaged, whole.averaged)


def test_a_tuple_is_checked_once_and_a_list_each_time() -> None:
    ema, weights = EMA(0.5, warmup=None), (torch.zeros(2), torch.zeros(3))
    for step in range(3):
        ema.update_(weights, step=step)
    assert ema._prepared is not None and ema._prepared[0] is weights
    assert copy.deepcopy(ema)._prepared is None  # a copy takes no weights with it
    ema.load(ema.counters, [torch.ones(2), torch.ones(3)])
    ema.update_(weights, step=3)
    assert ema.averaged[0].tolist() == [0.5, 0.5]
    ema.update_([torch.ones(2, dtype=torch.bfloat16), torch.ones(3)], step=4)
    assert ema.averaged[0].tolist() == [0.75, 0.75]


# ---- dtypes, layouts, memory ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_an_fp32_average_that_moves(dtype: torch.dtype) -> None:
    weight, stuck = torch.ones(4, dtype=dtype), torch.ones(4, dtype=dtype)
    ema = EMA(0.9999, warmup=None)
    ema.update_([weight], step=0)
    weight += 1.0
    for step in range(1, 1001):
        ema.update_([weight], step=step)
        stuck.lerp_(weight, 1.0 - 0.9999)
    assert ema.averaged[0].dtype == torch.float32
    torch.testing.assert_close(ema.averaged[0], torch.full((4,), 2.0 - 0.9999**1000), rtol=1e-4, atol=0.0)
    assert stuck.tolist() == [1.0] * 4


def _weights(dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Return many small tensors, a scalar, an empty one, views that are not contiguous, and one larger than a chunk."""
    shapes = [(3, 4)] * 20 + [(), (0, 2), (600, 500), (7,)]
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [*weights, torch.randn(5, 3, generator=generator).to(dtype).t(), torch.ones(3, dtype=dtype).expand(4, 3)]


@pytest.mark.parametrize("mixed", [False, True], ids=["one dtype", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_shape_and_layout(dtype: torch.dtype, mixed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ema, together = EMA(0.9), []
    for step in range(3):
        weights = _weights(dtype, generator) + (_weights(torch.float32, generator) if mixed else [])
        together.append(weights)
        ema.update_(weights, step=step)
    for index, average in enumerate(ema.averaged):
        wanted = _closed_form([weights[index] for weights in together], [0, 1, 2], 0.9, 2 / 3)
        assert average.dtype == accumulation_dtype(together[0][index].dtype)
        torch.testing.assert_close(average, wanted.to(average.dtype), rtol=1e-5, atol=1e-6)


def test_complex_weights() -> None:
    ema = EMA(0.5, warmup=None)
    ema.update_([torch.tensor([1.0 + 2.0j])], step=0)
    ema.update_([torch.tensor([3.0 + 0.0j])], step=1)
    assert ema.averaged[0].tolist() == [2.0 + 1.0j]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0), (torch.bfloat16, 2 << 18)])
@pytest.mark.parametrize(
    "shapes",
    [[(1_000_000,)], [(500, 100)] * 20, [(100, 100, 10, 10)]],
    ids=["one large", "many small", "channels last"],
)
def test_no_temporary_has_the_size_of_the_model(shapes: list[tuple[int, ...]], dtype: torch.dtype, most: int) -> None:
    weights = [torch.ones(shape, dtype=dtype) for shape in shapes]
    weights = [w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    ema = EMA(0.9)
    with Operators() as copies:
        ema.update_(weights, step=0)
    with Operators() as updates:
        ema.update_(weights, step=1)
    assert copies.peak == 1_000_000
    assert updates.peak <= most


def test_no_graph_is_built() -> None:
    weight = nn.Parameter(torch.ones(2))
    ema = EMA(0.9)
    for step in range(2):
        ema.update_([weight], step=step)
        assert not ema.averaged[0].requires_grad


# ---- state ----


def _run(ema: Average, steps: range, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    for step in steps:
        ema.update_([torch.randn(3, 2, generator=generator).to(dtype), torch.randn(4, generator=generator)], step=step)
    return [tensor.clone() for tensor in ema.averaged]


def _from_state(ema: EMA) -> EMA:
    state = pickle.loads(pickle.dumps(ema.state_dict()))
    other = EMA(0.9)
    other.load_state_dict(state)
    for tensor in state["averaged"]:
        tensor.fill_(7.0)  # the state is the caller's: nothing of it may be live here
    return other


def _from_parts(ema: EMA) -> EMA:
    other = EMA(0.9)
    other.load(ema.counters, [tensor.clone() for tensor in ema.averaged])
    return other


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema)), _from_state, _from_parts]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_goes_on_bit_for_bit(copied, dtype: torch.dtype) -> None:
    whole = _run(EMA(0.9), range(0, 12, 2), torch.Generator().manual_seed(0), dtype)
    generator = torch.Generator().manual_seed(0)
    first = EMA(0.9)
    _run(first, range(0, 6, 2), generator, dtype)
    second = copied(first)
    first.averaged[0].fill_(9.0)
    resumed = _run(second, range(6, 12, 2), generator, dtype)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))
    assert second.counters == {"updates": 6, "first": 0, "last": 10}


def test_state_of_an_average_that_never_started() -> None:
    ema = EMA(0.9)
    ema.load_state_dict(EMA(0.9).state_dict())
    assert not ema.started
    ema.update_([torch.ones(1)], step=4)
    assert ema.averaged[0].item() == 1.0


def test_on_resume_the_decay_given_now_wins() -> None:
    ema = EMA(0.9, warmup=None)
    ema.update_([torch.zeros(1)], step=0)
    other = EMA(0.5, warmup=None)
    other.load_state_dict(ema.state_dict())
    other.update_([torch.ones(1)], step=1)
    assert other.averaged[0].item() == 0.5


def test_values_may_change_places_with_the_weights_and_back() -> None:
    weight = torch.tensor([1.0, 2.0])
    ema, plain = EMA(0.9), EMA(0.9)
    for step in range(4):
        ema.update_([weight], step=step)
        plain.update_([weight], step=step)
        foreach.swap_(ema.averaged[0], weight)
        assert torch.equal(weight, plain.averaged[0])
        foreach.swap_(ema.averaged[0], weight)
        weight += 1.0
    assert torch.equal(ema.averaged[0], plain.averaged[0])


def test_other_tensor_objects_are_taken_as_well() -> None:
    ema, other = EMA(0.9), EMA(0.9)
    weight = torch.zeros(3)
    for step in range(5):
        weight += 1.0
        ema.update_([weight], step=step)
        other.update_([weight.clone()], step=step)
    assert torch.equal(ema.averaged[0], other.averaged[0])


def test_another_number_of_tensors_is_an_error() -> None:
    ema = EMA(0.9)
    ema.update_([torch.zeros(1)], step=0)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        ema.update_([torch.zeros(1), torch.zeros(1)], step=1)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: EMA(1.0), r"`decay` must be a number in \[0.0, 1.0\), got 1.0"),
        (lambda: EMA(-0.1), r"`decay` must be a number in \[0.0, 1.0\), got -0.1"),
        (lambda: EMA("0.9"), r"`decay` must be a number in \[0.0, 1.0\), got '0.9'"),
        (lambda: EMA(0.9, warmup=0), "`warmup` must be a number > 0.0, got 0"),
        (lambda: EMA(0.9, warmup=True), "`warmup` must be a number > 0.0, got True"),
        (lambda: EMA(), "Pass either `decay` or `half_life`, got decay=None and half_life=None"),
        (lambda: EMA(0.9, half_life=3), "Pass either `decay` or `half_life`, got decay=0.9 and half_life=3"),
        (lambda: EMA(half_life=0), "`half_life` must be a number > 0.0, got 0"),
        (lambda: LAWA(0), "`size` must be an integer >= 1, got 0"),
    ],
)
def test_refused(build, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


def test_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--average", type=Average)
    text = "{class_path: lightning_optim.averaging.averages.ema.EMA, init_args: {decay: 0.99, warmup: null}}"
    average = instantiate(parser, parser.parse_args([f"--average={text}"])).average
    assert isinstance(average, EMA)
    assert (average.decay, average.warmup) == (0.99, None)


# ---- on two processes ----


def _on_shards(dtype: torch.dtype) -> tuple[list[float], list[bool]]:
    """Compare averages of shards with those of full tensors; return their distance and if placements agree."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    placements = [Shard(0), Shard(0), Shard(1), Replicate()]
    whole_ema, ema = EMA(0.9), EMA(0.9)
    for step in range(0, 8, 2):
        shapes = [(5, 3), (1,), (4, 3), (6,), (7,)]
        whole = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        placed = [distribute_tensor(w, mesh, [p]) for w, p in zip(whole[:4], placements, strict=True)] + whole[4:]
        whole_ema.update_(whole, step=step)
        ema.update_(placed, step=step)
        ema = copy.deepcopy(ema)
    far = [
        (shards.gather_to_cpu(average) - wanted).abs().max().item()
        for average, wanted in zip(ema.averaged, whole_ema.averaged, strict=True)
    ]
    alike = [
        average.placements == weight.placements and average.shape == weight.shape and average.dtype == torch.float32
        for average, weight in zip(ema.averaged[:4], placed[:4], strict=True)
    ]
    return far, alike


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_are_averaged_where_they_lie(group: Group, dtype: torch.dtype) -> None:
    for far, alike in group.run(_on_shards, dtype):
        assert far == [0.0] * 5
        assert alike == [True] * 4
