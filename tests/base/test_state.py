"""Declared state: what each kind does, and that every public policy goes on from every step as if nothing had been."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim import (
    EMA,
    L2,
    AllOf,
    AnyOf,
    AtLeast,
    AutoClip,
    Average,
    ClipByNorm,
    Clipping,
    Cosine,
    Criterion,
    Linear,
    NonFinite,
    Penalty,
    Plateau,
    Policy,
    Proximal,
    Schedule,
    TargetBatchSize,
    Threshold,
    WeightDecay,
    ZClip,
)
from lightning_optim.base import PerOptimizer, local_shards, nested, per_unit, per_weight, ring
from lightning_optim.stopping.improvement import Best
from tests.harness.cells import CELLS
from tests.registry import ALL_ENTRIES, SlowGradients, parts_of
from tests.test_matrix import BASES

# Beside those of the registry: so that what they remember counts within a few steps, and those in `EarlyStopping`.
MORE: list[Policy] = [
    AutoClip(50.0, history=4, scope="tensor"),
    AutoClip(Linear(10.0, 90.0)),
    ClipByNorm(1.0, scope="tensor"),
    ZClip(z=0.5, warmup=2, release_after=2, scope="tensor"),
    ZClip(z=0.5, warmup=2, release_after=2),
    L2(Cosine(1.0, 0.0)),
    EMA(half_life=2.0, warmup=None),
    Plateau("loss", patience=2, min_delta=0.1),
    AnyOf([NonFinite("loss"), Plateau("loss", patience=2)]),
    AllOf([Threshold("loss", 1.5), Plateau("acc", patience=1, mode="max")]),
    AtLeast(1, [Plateau("acc", patience=2, mode="max"), AnyOf([Plateau("loss", patience=3)])]),
    Best(["acc", "loss"], mode=["max", "min"]),
]
IN_REGISTRY = [p for entry in ALL_ENTRIES for p in parts_of(entry.all_callbacks(CELLS[0])) if isinstance(p, Policy)]
POLICIES = list({repr(policy): policy for policy in [*IN_REGISTRY, *MORE]}.values())
STEPS = 12
WEIGHTS = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((4, 3), (5,), (2, 3, 2))]
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=repr)


def tensors(step: int) -> list[Tensor]:
    """Some tensors that grow and shrink, the second of which is not there at first."""
    generator = torch.Generator().manual_seed(step)
    some = [torch.randn(shape, generator=generator) * (1 + step % 4) for shape in ((4, 3), (5,), (2, 3, 2))]
    return some if step >= 3 else some[:1]


def act(policy: Policy, step: int) -> Any:
    """Let a policy act once; return all that it tells and changes."""
    grads = tensors(step)
    weights = WEIGHTS[: len(grads)]
    if isinstance(policy, Clipping):
        units = {"units": range(len(grads))} if policy.scope == "tensor" else {}
        norm = policy.clip_(grads, weights, step=step, total=STEPS, **units)
        return [grads, norm, policy.clipped]
    if isinstance(policy, Penalty):
        value = policy.value(weights, step=step, total=STEPS)
        policy.add_grad_(weights, grads, step=step, total=STEPS)
        return [grads, value]
    if isinstance(policy, Proximal):
        projected = [weight.clone() for weight in weights]
        policy.project_(projected, lr=0.1, step=step, total=STEPS)
        return projected
    if isinstance(policy, WeightDecay):
        decayed = [weight.clone() for weight in weights]
        policy.before_step_(decayed, lr=0.1, step=step, total=STEPS)
        torch._foreach_add_(decayed, grads)
        policy.after_step_()
        return decayed
    if isinstance(policy, Average):
        weights = tensors(step + 100)[:2]
        policy.update_(weights, step=step + step // 4)
        return [[t.clone() for t in policy.averaged], policy.counters]
    if isinstance(policy, TargetBatchSize):
        return policy.micro_batches(4, 1)
    if isinstance(policy, Schedule):
        return policy(step, STEPS)
    metrics = dict.fromkeys(policy.monitors, 4.0 - abs(step - 6) % 4) | {"acc": float(step % 5)}
    if isinstance(policy, Best):
        return [policy.better(metrics), policy.best]
    assert isinstance(policy, Criterion)
    return [policy.update(metrics), policy.improved, policy.reason]


def _plain(tree: Any) -> Any:
    """A tree without tensors: their bits, so that NaN equals NaN."""
    if isinstance(tree, Tensor):
        return [str(tree.dtype), tuple(tree.shape), tree.contiguous().view(-1).view(torch.uint8).tolist()]
    if isinstance(tree, dict):
        return {name: _plain(value) for name, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


@each_policy
def test_goes_on_from_every_step(policy: Policy) -> None:
    """Saved after each step and loaded into a fresh copy, also after another past, it goes on bit for bit."""
    make = partial(copy.deepcopy, policy)
    whole, told = make(), []
    states = []
    for step in range(STEPS):
        told.append(act(whole, step))
        states.append(copy.deepcopy(whole.state_dict()))
    for begin, state in enumerate(states[:-1], start=1):
        fresh, used = make(), make()
        act(used, 5)
        for resumed in (fresh, used):
            resumed.load_state_dict(copy.deepcopy(state))
            for step in range(begin, STEPS):
                assert _plain(act(resumed, step)) == _plain(told[step]), f"resumed after step {begin}, seen at {step}"
            assert _plain(resumed.state_dict()) == _plain(states[-1])


@each_policy
def test_reset_forgets_everything(policy: Policy) -> None:
    fresh, used = copy.deepcopy(policy), copy.deepcopy(policy)
    for step in range(STEPS):
        act(used, step)
    used.reset()
    assert _plain(used.state_dict()) == _plain(fresh.state_dict())
    if not isinstance(used, Clipping) or used.scope == "global":  # a unit that was seen stays known
        assert [_plain(act(used, step)) for step in range(4)] == [_plain(act(fresh, step)) for step in range(4)]


@each_policy
def test_a_state_is_plain_and_not_shared(policy: Policy) -> None:
    policy, other = copy.deepcopy(policy), copy.deepcopy(policy)
    for step in range(5):
        act(policy, step)
    state = policy.state_dict()
    before = _plain(state)
    live = isinstance(policy, Average | SlowGradients)  # tensors beside weights are live storage, as a module's
    if not live:
        for step in range(5, STEPS):
            act(policy, step)
        assert _plain(state) == before
    other.load_state_dict(state)
    for step in range(5, STEPS):
        act(other, step)
    if not live:
        assert _plain(state) == before


def test_every_public_policy_is_here() -> None:
    public = [getattr(lightning_optim, name) for name in lightning_optim.__all__]
    policies = {thing for thing in public if inspect.isclass(thing) and issubclass(thing, Policy)}
    assert policies - BASES <= {type(policy) for policy in POLICIES}


# ---- the kinds -------------------------------------------------------------------------------------------------------


class Remembers(Clipping):
    """Each kind at once."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", None)
        self.add_state("_hidden", [math.inf, "text"])
        self.add_state("units", per_unit(math.nan))
        self.add_state("rows", per_unit(1.0, rows=2))
        self.add_state("last", ring(2))
        self.add_state("beside", per_weight(torch.ones_like))


def test_values_are_plain_and_apart() -> None:
    one, other = Remembers(), Remembers()
    one._hidden.append(3)
    assert other._hidden == [math.inf, "text"]
    assert one.state_dict()["hidden"] == [math.inf, "text", 3], "a leading underscore is not part of the name"
    other.load_state_dict(one.state_dict())
    other._hidden.append(4)
    assert one._hidden == [math.inf, "text", 3]
    one.reset()
    assert one._hidden == [math.inf, "text"]


def test_units_grow_and_never_shrink() -> None:
    policy = Remembers()
    like = torch.zeros((), dtype=torch.float64)
    policy._grow(2, like)
    assert policy.units.dtype == torch.float64 and policy.units.isnan().tolist() == [True, True]
    policy.units, policy.rows = torch.tensor([5.0, 6.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    policy._grow(3, like)
    assert policy.units[:2].tolist() == [5.0, 6.0] and policy.units[2].isnan()
    assert policy.rows.tolist() == [[1.0, 2.0, 1.0], [3.0, 4.0, 1.0]]
    assert policy._known_units() == 3
    policy.last.append(torch.ones(4))
    assert policy._known_units() == 4


def test_a_state_that_is_missing_starts_anew() -> None:
    policy = Remembers()
    policy.value = 7
    policy.load_state_dict({"hidden": ["loaded"], "of a subclass": 1})
    assert (policy.value, policy._hidden) == (None, ["loaded"])


def test_tensors_beside_weights_are_live_and_follow_names() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    policy = Remembers()
    policy.name_weights(model)
    first = list(model[0].parameters())
    beside = policy.beside.of(first)
    assert [t.shape for t in beside] == [w.shape for w in first]
    beside[0].add_(1.0)
    state = policy.state_dict()["beside"]
    assert list(state) == ["0.weight", "0.bias"]
    assert state["0.weight"] is policy.beside.of(first)[0], "saving copies nothing"

    other = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    resumed = Remembers()
    resumed.load_state_dict(policy.state_dict())
    resumed.name_weights(other)
    beside[0].add_(1.0)
    weights = list(reversed(list(other.parameters())))
    names = {id(w): name for name, w in other.named_parameters()}
    found = dict(zip([names[id(w)] for w in weights], resumed.beside.of(weights), strict=True))
    assert found["0.weight"].eq(2.0).all(), "as it was when it was loaded"
    assert found["1.weight"].eq(1.0).all(), "a weight that came later begins"
    assert set(resumed.state_dict()["beside"]) == set(dict(other.named_parameters()))


def test_what_was_loaded_for_weights_that_were_not_seen_is_saved_again() -> None:
    policy = Remembers()
    policy.load_state_dict({"beside": {"w": torch.full((2,), 3.0)}})
    assert policy.state_dict()["beside"]["w"].tolist() == [3.0, 3.0]


def test_without_a_module_weights_are_named_in_the_order_in_which_they_come() -> None:
    weights = [torch.zeros(2), torch.zeros(3)]
    policy = Remembers()
    policy.beside.of(weights[1:])[0].fill_(7.0)
    policy.beside.of(weights)
    assert [t.shape[0] for t in policy.state_dict()["beside"].values()] == [3, 2]
    resumed = Remembers()
    resumed.load_state_dict(policy.state_dict())
    assert resumed.beside.of([torch.zeros(3)])[0].tolist() == [7.0] * 3


def test_a_tensor_that_is_no_parameter_is_refused() -> None:
    policy, model = Remembers(), nn.Linear(2, 2)
    policy.name_weights(model)
    with pytest.raises(ValueError, match=r"tensor of shape \(4, 2\) is no parameter of the model"):
        policy.beside.of([torch.zeros(4, 2)])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_takes_no_model_with_it(copied: Callable[[Policy], Policy]) -> None:
    model, policy = nn.Linear(2, 2), Remembers()
    policy.name_weights(model)
    policy.beside.of(list(model.parameters()))[0].fill_(5.0)
    policy.last.append(torch.ones(1))
    other = copied(policy)
    assert _plain(other.state_dict()) == _plain(policy.state_dict())
    policy.beside.of(list(model.parameters()))[0].fill_(6.0)
    assert other.state_dict()["beside"]["weight"].eq(5.0).all()
    again = nn.Linear(2, 2)
    other.name_weights(again)
    assert other.beside.of([again.weight])[0].eq(5.0).all()


def test_one_copy_for_each_optimizer_with_names() -> None:
    model = nn.Linear(2, 2)
    copies = PerOptimizer([Remembers()])
    copies[0][0].beside.of([model.weight])
    copies.name_weights(model)
    copies[1][0].beside.of([model.bias])[0].fill_(2.0)
    state = copies.state_dict()
    assert list(state[1][0]["beside"]) == ["bias"]
    resumed = PerOptimizer([Remembers()])
    resumed.load_state_dict(state)
    resumed.name_weights(model)
    assert resumed[1][0].beside.of([model.bias])[0].tolist() == [2.0, 2.0]
    assert not resumed._template[0].state_dict()["beside"]


def test_nested_policies_have_tensors_by_the_names_of_weights() -> None:
    class Holds(Policy):
        def __init__(self) -> None:
            self.add_state("parts", nested([Remembers()]))

    model, policy = nn.Linear(2, 2), Holds()
    policy.name_weights(model)
    policy.parts[0].beside.of([model.bias])
    (((_, state),),) = policy.state_dict().values()
    assert list(state["beside"]) == ["bias"]


def test_nested_policies_are_found_by_identity() -> None:
    class Holds(Policy):
        def __init__(self, parts: list[Policy]) -> None:
            self.add_state("parts", nested(parts))

    one, other = Holds([Plateau("a"), Plateau("b")]), Holds([Plateau("b"), Plateau("c"), Plateau("a")])
    one.parts[1].update({"b": 1.0})
    other.load_state_dict(one.state_dict())
    assert [part.best for part in other.parts] == [1.0, math.inf, math.inf]
    other.reset()
    assert [part.best for part in other.parts] == [math.inf] * 3


# ---- state in methods of one's own -----------------------------------------------------------------------------------


class ByHand(Plateau):
    """A user's class that saves a number of its own, beside what its base declares."""

    def __init__(self, monitor: str) -> None:
        super().__init__(monitor)
        self.calls = 0

    def update(self, metrics: Any) -> bool:
        self.calls += 1
        return super().update(metrics)

    def reset(self) -> None:
        super().reset()
        self.calls = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.calls = state["calls"]


def test_a_subclass_may_override_saving() -> None:
    one, other = ByHand("a"), ByHand("a")
    one.update({"a": 1.0})
    one.update({"a": 2.0})
    other.load_state_dict(one.state_dict())
    assert (other.calls, other.best, other.wait) == (2, 1.0, 1)
    other.reset()
    assert (other.calls, other.best, other.wait) == (0, math.inf, 0)


class WholeSignature(ClipByNorm):
    """A user's class that follows the signature with all arguments of a step."""

    def clip_(self, grads, weights=(), *, norm=None, step=0, total=math.inf):
        torch._foreach_mul_(local_shards(grads), float(step))
        return norm


class WholeBound(AutoClip):
    def bound(self, norms, *, step=0, total=math.inf):
        return float(step)


def test_subclasses_with_all_arguments_of_a_step_are_called_with_them() -> None:
    grad = torch.ones(4)
    WholeSignature(1.0).clip_([grad], step=3, total=5)
    assert grad.tolist() == [3.0] * 4
    grad = torch.full((4,), 5.0)
    WholeBound().clip_([grad], step=2, total=5)
    assert grad.norm().item() == pytest.approx(2.0, rel=1e-5)
