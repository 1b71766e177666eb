"""AutoClip, ZClip, AGC, Centralize and Noise: formulas, other implementations, shards, state."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_optimizer.optimizer.agc import agc
from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_optim import AGC, AutoClip, Centralize, ClipByNorm, Linear, Noise, NormClipping, ZClip
from lightning_optim.base import shards
from lightning_optim.base.norms import total_norm
from lightning_optim.base.ring_buffer import Ring
from lightning_optim.gradients.clipping.clipping_policy import Clipping
from lightning_optim.gradients.step_skipping import NormCheck
from tests.harness.process_group import Group

SHAPES = [(4, 3), (7,), (), (2, 3, 2), (3, 2, 2, 2)]


def _tensors(seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


def _clipped_norms(policy: NormClipping, norms: list[float]) -> list[float]:
    """Clip gradients of these norms one after the other, and return the clipped norms."""
    left = []
    for norm in norms:
        grad = torch.tensor([0.6 * norm, 0.8 * norm])
        policy.clip_([grad])
        left.append(grad.norm().item())
    return left


# ---- scope -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_each_tensor_has_its_own_norm(norm_type: float) -> None:
    grads, alone = _tensors(), _tensors()
    norm = ClipByNorm(0.7, norm_type, scope="tensor").clip_(grads)
    torch.testing.assert_close(norm, total_norm(alone, norm_type))
    for grad, own in zip(grads, alone, strict=True):
        ClipByNorm(0.7, norm_type).clip_([own])
        torch.testing.assert_close(grad, own, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_each_group_has_its_own_norm(norm_type: float) -> None:
    grads, alone = _tensors(), _tensors()
    norm = ClipByNorm(0.7, norm_type, scope="group").clip_(grads, units=[0, 2, 0, 2, 2])
    torch.testing.assert_close(norm, total_norm(alone, norm_type))
    for group in ([0, 2], [1, 3, 4]):
        ClipByNorm(0.7, norm_type).clip_([alone[i] for i in group])
    for grad, own in zip(grads, alone, strict=True):
        torch.testing.assert_close(grad, own, rtol=1e-6, atol=0.0)


def test_units_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="`units` must name the unit of each of 5 gradients"):
        ClipByNorm(1.0, scope="group").clip_(_tensors(), units=[0])


@pytest.mark.parametrize("scope", ["group", "tensor"])
@pytest.mark.parametrize("policy", [partial(AutoClip, 40.0), partial(ZClip, z=0.5, warmup=2)])
def test_units_come_and_go(policy: Any, scope: Any) -> None:
    """Each unit has the history that it would have alone, whichever units have gradients, also after a resume."""
    together = policy(scope=scope)
    alone = [policy(), policy(), policy()]
    clipped = 0
    there = [[0, 1], [1], [0], [0, 1, 2], [2], [0], [1, 2]] * 5
    for step, units in enumerate(there):
        grads = [torch.tensor([float((3 * step + 5 * unit) % 7 + 1)]) for unit in units]
        wanted = [grad.clone() for grad in grads]
        if step == 19:
            resumed = policy(scope=scope)
            resumed.load_state_dict(together.state_dict())
            together = resumed
        together.clip_(grads, units=units)
        for unit, grad, own in zip(units, grads, wanted, strict=True):
            alone[unit].clip_([own])
            torch.testing.assert_close(grad, own)
        clipped += int(together.clipped)
    assert clipped >= 10


# ---- AutoClip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [0.0, 10.0, 37.0, 50.0, 100.0])
def test_auto_clip_is_torchs_quantile_of_the_history(percentile: float) -> None:
    norms = torch.rand(30, generator=torch.Generator().manual_seed(1)).add(0.1).tolist()
    left = _clipped_norms(AutoClip(percentile, history=8), norms)
    for step, norm in enumerate(norms):
        history = torch.tensor(norms[max(0, step - 7) : step + 1])
        assert left[step] == pytest.approx(min(norm, torch.quantile(history, percentile / 100.0).item()), rel=1e-4)


def test_auto_clip_stores_no_nonfinite_norm() -> None:
    left = _clipped_norms(AutoClip(0.0), [math.nan, 2.0, math.inf, 3.0, 1.0, 4.0])
    assert left[1::2] == pytest.approx([2.0, 2.0, 1.0], rel=1e-4)


def test_a_schedule_moves_the_percentile() -> None:
    policy = AutoClip(Linear(0.0, 100.0))
    for step, size in enumerate([1.0, 3.0]):
        grad = torch.tensor([size])
        policy.clip_([grad], step=step, total=2)
    assert grad.item() == pytest.approx(3.0)


# ---- ZClip -----------------------------------------------------------------------------------------------------------


def _reference_zclip(norms: list[float], z: float, decay: float, warmup: int) -> list[float]:
    left, first = norms[:warmup], norms[:warmup]
    mean = sum(first) / warmup
    variance = sum((n - mean) ** 2 for n in first) / warmup
    for norm in norms[warmup:]:
        deviation = math.sqrt(variance) + 1e-6
        score = (norm - mean) / deviation
        after = mean + z * deviation / (score / z) if score > z else norm
        left.append(after)
        mean = decay * mean + (1 - decay) * after
        variance = decay * variance + (1 - decay) * (after - mean) ** 2
    return left


def test_reference_zclip() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = (1.0 + 0.1 * torch.randn(60, generator=generator)).tolist()
    norms[30], norms[45] = 50.0, 4.0
    left = _clipped_norms(ZClip(z=2.5, decay=0.97, warmup=25, release_after=1000), norms)
    wanted = _reference_zclip(norms, 2.5, 0.97, 25)
    assert left == pytest.approx(wanted, rel=1e-4)
    assert left[30] < 1.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", [0, 3, 12])
def test_zclip_still_clips_after_a_nonfinite_norm(bad: float, when: int) -> None:
    norms = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0] * 3
    norms.insert(when, bad)
    policy = ZClip(warmup=6)
    _clipped_norms(policy, norms)
    assert policy.state_dict()["statistics"].isfinite().all()
    assert _clipped_norms(policy, [50.0])[0] < 1.5


def test_zclip_releases_a_level_that_has_shifted() -> None:
    calm = [1.0, 1.1, 0.9] * 4
    shifted = [3.0, 3.2, 2.8] * 4
    left = _clipped_norms(ZClip(warmup=6, release_after=5), calm + shifted)[len(calm) :]
    assert max(left[:5]) < 1.5
    assert left[5:] == pytest.approx(shifted[5:], rel=1e-4)
    locked = _clipped_norms(ZClip(warmup=6, release_after=1000), calm + shifted)[len(calm) :]
    assert max(locked) < 1.5


def test_zclip_without_variance_clips_to_the_mean() -> None:
    assert _clipped_norms(ZClip(warmup=2), [1.0, 1.0, 1.0, 5.0])[2:] == pytest.approx([1.0, 1.0], rel=1e-4)


# ---- AGC -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_agc_is_that_of_a_peer(scale: float, share: float) -> None:
    weights, grads = _tensors(0), _tensors(1, scale)
    wanted = [
        agc(w, g, agc_clip_val=share) if g.ndim != 3 else _agc_by_rows(w, g, share)
        for w, g in zip(weights, grads, strict=True)
    ]
    AGC(share).clip_(grads, weights)
    for grad, peer in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, peer, rtol=1e-5, atol=1e-9)


def _agc_by_rows(weight: Tensor, grad: Tensor, share: float) -> Tensor:
    # The peer's norm of a tensor with three dimensions goes over one of them only.
    limits = [share * max(w.norm().item(), 1e-3) for w in weight]
    return torch.stack([g * min(1.0, limit / g.norm().item()) for g, limit in zip(grad, limits, strict=True)])


def test_agc_lets_weights_of_zero_grow() -> None:
    grad = torch.ones(2, 4)
    AGC(0.01).clip_([grad], [torch.zeros(2, 4)])
    assert grad.norm(dim=1).tolist() == pytest.approx([1e-5, 1e-5])


def test_agc_wants_the_weights() -> None:
    with pytest.raises(ValueError, match=r"`weights` must be the parameters of 5 gradients, got 0"):
        AGC().clip_(_tensors())


def test_stacked_members_have_rows_of_their_own() -> None:
    members = [_tensors(seed)[0] for seed in (0, 1)]
    slopes = [_tensors(seed, 10.0)[0] for seed in (2, 3)]
    weight, grad = torch.stack(members), torch.stack(slopes)
    weight.member_dim = 0  # type: ignore[attr-defined]
    bias, slope = torch.ones(2, 3), torch.ones(2, 3)
    bias.member_dim = 0  # type: ignore[attr-defined]
    for policy in (AGC(0.1), Centralize()):
        policy.clip_([grad, slope], [weight, bias])
        for own, its in zip(slopes, members, strict=True):
            policy.clip_([own], [its])
        torch.testing.assert_close(grad, torch.stack(slopes))


# ---- Centralize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centralize_is_that_of_a_peer(dtype: torch.dtype) -> None:
    grads, peer = _tensors(dtype=dtype), _tensors(dtype=dtype)
    Centralize().clip_(grads)
    for grad, other in zip(grads, peer, strict=True):
        centralize_gradient(other)
        torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 2e-2)
        if grad.ndim >= 2:
            assert grad.float().flatten(1).mean(1).abs().max() < (1e-6 if dtype == torch.float32 else 1e-2)


# ---- Noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 99])
def test_noise_has_the_variance_of_the_formula(step: int) -> None:
    grad = torch.full((200, 500), 3.0)
    Noise(eta=0.3, gamma=0.55).clip_([grad], step=step)
    assert grad.mean().item() == pytest.approx(3.0, abs=0.01)
    assert grad.var().item() == pytest.approx(0.3 / (1 + step) ** 0.55, rel=0.02)


def test_noise_is_new_in_each_step_each_tensor_and_each_optimizer() -> None:
    policy, other = Noise(), Noise()
    other.copy_index = 1
    draws = []
    for each in (policy, policy, other):
        grads = [torch.zeros(5), torch.zeros(5)]
        each.clip_(grads)
        draws += [tuple(grad.tolist()) for grad in grads]
    assert len(set(draws)) == len(draws)


# ---- all -------------------------------------------------------------------------------------------------------------

REMEMBERING = [AutoClip(30.0, history=5), AutoClip(30.0, scope="tensor"), ZClip(warmup=3, decay=0.5), Noise(eta=1.0)]


@pytest.mark.parametrize("policy", REMEMBERING, ids=repr)
def test_goes_on_from_its_state_as_if_it_had_not_stopped(policy: Clipping) -> None:
    going, stopped = copy.deepcopy(policy), copy.deepcopy(policy)
    for step in range(7):
        going.clip_(_tensors(step, 1.0 + step % 3), _tensors(9), step=step)
        stopped.clip_(_tensors(step, 1.0 + step % 3), _tensors(9), step=step)
    resumed = copy.deepcopy(policy)
    resumed.load_state_dict(stopped.state_dict())
    fresh, wrong = _tensors(8, 5.0), _tensors(8, 5.0)
    wanted = _tensors(8, 5.0)
    going.clip_(wanted, _tensors(9), step=7)
    resumed.clip_(fresh, _tensors(9), step=7)
    assert all(torch.equal(a, b) for a, b in zip(fresh, wanted, strict=True))
    copy.deepcopy(policy).clip_(wrong, _tensors(9), step=7)
    assert not all(torch.equal(a, b) for a, b in zip(wrong, wanted, strict=True))


@pytest.mark.parametrize("policy", REMEMBERING[:3], ids=repr)
def test_units_without_a_gradient_right_after_a_resume(policy: NormClipping) -> None:
    """The number of units is part of the state, and not that of the first gradients after the resume."""
    policy = copy.deepcopy(policy)
    policy.scope = "tensor"
    going, resumed = copy.deepcopy(policy), copy.deepcopy(policy)
    for step in range(7):
        going.clip_(_tensors(step, 1.0 + step % 3))
    resumed.load_state_dict(copy.deepcopy(going.state_dict()))
    for units in ([0], [1], [0, 1, 2]):
        one, other = ([_tensors(8, 5.0)[unit] for unit in units] for _ in range(2))
        going.clip_(one, units=units)
        resumed.clip_(other, units=units)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for name, value in going.state_dict().items():
        assert str(value) == str(resumed.state_dict()[name])


def test_a_resumed_history_may_have_another_length() -> None:
    policy = AutoClip(0.0, history=6)
    _clipped_norms(policy, [1.0, 5.0, 4.0, 3.0])
    shorter, longer = AutoClip(0.0, history=2), AutoClip(0.0, history=9)
    shorter.load_state_dict(policy.state_dict())
    longer.load_state_dict(policy.state_dict())
    assert _clipped_norms(shorter, [9.0]) == pytest.approx([3.0], rel=1e-4)
    assert _clipped_norms(longer, [9.0]) == pytest.approx([1.0], rel=1e-4)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: ClipByNorm(1.0, scope="layer"),
            "`scope` must be one of 'global', 'group', 'tensor', got 'layer'",
        ),
        (lambda: AutoClip(101.0), "`percentile` must be .* in .0.0, 100.0., got 101.0"),
        (lambda: AutoClip(history=0), "`history` must be an integer >= 1, got 0"),
        (lambda: ZClip(z=0.0), "`z` must be .* > 0.0, got 0.0"),
        (lambda: ZClip(decay=1.0), "`decay` must be a number in .0.0, 1.0., got 1.0"),
        (lambda: ZClip(warmup=0), "`warmup` must be an integer >= 1, got 0"),
        (lambda: ZClip(release_after=0), "`release_after` must be an integer >= 1, got 0"),
        (lambda: AGC(0.0), "`clipping` must be .* > 0.0, got 0.0"),
        (lambda: AGC(eps=0.0), "`eps` must be a number > 0.0, got 0.0"),
        (lambda: Noise(eta=-1.0), "`eta` must be .* >= 0.0, got -1.0"),
        (lambda: Noise(seed=0.5), "`seed` must be an integer >= 0, got 0.5"),
    ],
)
def test_refused(build: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


def _on_shards() -> list[tuple[str, float]]:
    """Return the errors of shards, replicas and plain tensors against whole tensors, after two steps of each policy."""
    mesh = init_device_mesh("cpu", (2,))
    placements = [Shard(0), Shard(1), Shard(0), Replicate(), Shard(2), Shard(0)]
    shapes = [(5, 3), (4, 3), (7,), (6, 2), (3, 2, 3), (1,)]

    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator) for shape in [*shapes, (4, 2)]]

    def place(whole: list[Tensor]) -> list[Tensor]:
        return [distribute_tensor(w.clone(), mesh, [p]) for w, p in zip(whole[:-1], placements, strict=True)] + [
            whole[-1].clone()
        ]

    far = []
    policies: list[Any] = [ClipByNorm(0.5, p, scope=s) for p in (2.0, math.inf) for s in ("group", "tensor")]
    policies += [
        AGC(0.1),
        Centralize(),
        Noise(1.0),
        AutoClip(50.0, scope="tensor"),
        ZClip(warmup=1, z=0.1, scope="group"),
    ]
    for policy in policies:
        other = copy.deepcopy(policy)
        units = {"units": [0, 1, 0, 1, 0, 1, 0]} if policy.scope == "group" else {}
        for step in range(2):
            grads, weights = [(1 + step) * grad for grad in make(step)], make(5)
            placed = place(grads)
            policy.clip_(placed, place(weights), step=step, **units)
            other.clip_(grads, weights, step=step, **units)
            far += [
                (repr(policy), (shards.gather_to_cpu(p) - g).abs().max().item())
                for p, g in zip(placed, grads, strict=True)
            ]
    return far


def test_exact_on_shards(group: Group) -> None:
    for far in group.run(_on_shards):
        assert len(far) == 9 * 2 * 7
        assert [(name, error) for name, error in far if not error < 2e-6] == []


def test_recent_keeps_the_last_rows_in_order() -> None:
    recent = Ring(3)
    assert recent.rows.numel() == 0
    for value in range(5):
        recent.append(torch.tensor([float(value), math.nan]))
    assert recent.rows[:, 0].tolist() == [2.0, 3.0, 4.0]
    quantile = recent.quantile(0.5)
    assert quantile[0] == 3.0
    assert quantile[1].isnan()


@pytest.mark.parametrize(("norm", "reason"), [(5.9, None), (6.1, "spike")])
def test_a_spike_is_measured_against_the_median(norm: float, reason: str | None) -> None:
    """The sixth of eleven norms is used, and not their mean, another quantile or the last."""
    check = NormCheck(finite=True, spike=2.0)
    for one in (1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.5, 4.0, 5.0, 5.0, 5.5):
        check._norms.append(torch.tensor([one]))
    assert check.check(torch.tensor(norm)) == (reason, pytest.approx(norm))


def test_a_spike_does_not_move_the_median_it_is_measured_against() -> None:
    check = NormCheck(finite=True, spike=2.0)
    reasons = [check.check(torch.tensor(norm))[0] for norm in [1.0] * 10 + [3.0] * 20 + [1.9]]
    assert reasons == [None] * 10 + ["spike"] * 20 + [None]
