"""Test that the mean of predictions is exact in every dtype, and has the properties of a mean."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from sklearn.ensemble import VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, nll_loss

from lightning_optim.ensembling.diversity import mutual_information
from lightning_optim.ensembling.mean_prediction import (
    log_mean_exp,
    mean_binary_logits,
    mean_logits,
    mean_prediction,
    mean_values,
)

M, B, C = 5, 32, 4


def logits(scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(M, B, C, generator=torch.Generator().manual_seed(seed))


def test_mean_logits_is_the_log_of_the_mean_probability() -> None:
    z = logits()
    assert torch.allclose(mean_logits(z), torch.softmax(z.double(), -1).mean(0).log().float(), atol=2e-6)
    assert torch.allclose(mean_logits(z).exp().sum(-1), torch.ones(B), atol=1e-6)


def test_mean_binary_logits_is_the_logit_of_the_mean_probability() -> None:
    z = logits()
    assert torch.allclose(mean_binary_logits(z), torch.sigmoid(z.double()).mean(0).logit().float(), atol=2e-5)
    two = torch.stack([z, torch.zeros_like(z)], -1)
    expected = mean_logits(two, dim=-1)
    assert torch.allclose(mean_binary_logits(z), expected[..., 0] - expected[..., 1], atol=1e-5)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 40.0), (torch.bfloat16, 120.0)])
def test_large_logits_in_half_precision_stay_finite_and_exact(dtype: torch.dtype, scale: float) -> None:
    z = logits(scale).to(dtype)
    assert torch.softmax(z, -1).mean(0).log().isinf().any(), "the naive way must fail here, or nothing is shown"
    result = mean_logits(z)
    assert result.dtype is torch.float32 and result.isfinite().all()
    wide = z.double().log_softmax(-1)
    assert torch.allclose(result.double(), wide.logsumexp(0) - math.log(M), rtol=1e-6, atol=1e-5)


def test_binary_logits_of_scale_100_stay_finite_and_exact() -> None:
    z = torch.tensor([[100.0, -100.0, 100.0], [100.0, -100.0, -100.0]])
    assert torch.sigmoid(z).mean(0).logit().isinf().any()
    assert torch.allclose(mean_binary_logits(z), torch.tensor([100.0, -100.0, 0.0]))


@pytest.mark.parametrize("kind", ["values", "logits", "binary_logits", "probabilities"])
def test_copies_of_one_member_give_that_member(kind: str) -> None:
    z = logits()[0]
    one = torch.softmax(z, -1) if kind == "probabilities" else z.log_softmax(-1)
    assert torch.allclose(mean_prediction([one] * 7, kind), one, atol=1e-5)


@pytest.mark.parametrize("kind", ["values", "logits", "binary_logits", "probabilities"])
def test_the_order_of_members_does_not_matter(kind: str) -> None:
    z = logits()
    assert torch.allclose(mean_prediction(z, kind), mean_prediction(z.flip(0), kind), atol=1e-5)
    assert not torch.allclose(mean_prediction(z, kind), mean_prediction(z[1:], kind), atol=1e-2)


@pytest.mark.parametrize("seed", range(5))
def test_on_every_batch_the_mean_loses_at_most_as_much_as_its_members(seed: int) -> None:
    z = logits(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, C, (B,), generator=generator)
    binary = torch.randint(0, 2, (B, C), generator=generator).float()
    targets = torch.randn(B, C, generator=generator)
    for member_losses, loss in (
        (
            [cross_entropy(member, y, reduction="none") for member in z],
            cross_entropy(mean_logits(z), y, reduction="none"),
        ),
        (
            [binary_cross_entropy_with_logits(member, binary, reduction="none") for member in z],
            binary_cross_entropy_with_logits(mean_binary_logits(z), binary, reduction="none"),
        ),
        (
            [mse_loss(member, targets, reduction="none") for member in z],
            mse_loss(mean_values(z), targets, reduction="none"),
        ),
    ):
        average = torch.stack(member_losses).mean(0)
        assert (loss <= average + 1e-5).all()
        assert (average - loss).mean() > 0.1, "these members differ, so the gain shows"


def test_the_squared_error_of_the_mean_is_the_members_less_their_ambiguity() -> None:
    f, y = logits().double(), logits(seed=1)[0].double()
    ambiguity = (f - mean_values(f)).square().mean(0)
    assert torch.allclose((mean_values(f) - y).square(), (f - y).square().mean(0) - ambiguity)


def test_total_uncertainty_is_aleatoric_plus_mutual_information() -> None:
    log_p = logits().log_softmax(-1).double()
    total = torch.special.entr(log_p.exp().mean(0)).sum(-1)
    aleatoric = torch.special.entr(log_p.exp()).sum(-1).mean(0)
    found = mutual_information(log_p)
    assert torch.allclose(found, total - aleatoric)
    assert (found > 0).all() and (found <= math.log(M)).all()


def test_mutual_information_of_members_that_nearly_agree_does_not_cancel() -> None:
    base = logits()[0].double()
    z = torch.stack([base + 1e-4 * torch.sin(torch.arange(B * C).view(B, C) + i) for i in range(M)])
    p = z.softmax(-1)
    # To second order KL is half the variance of the log-probabilities under p.
    deviation = z.log_softmax(-1) - z.log_softmax(-1).mean(0)
    expected = 0.5 * (p.mean(0) * deviation.square().mean(0)).sum(-1)
    assert torch.allclose(mutual_information(z.log_softmax(-1)), expected, rtol=1e-2, atol=1e-16)
    assert expected.max() < 1e-7


def test_sklearn_says_the_same_of_probabilities_and_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator).double()
    y = (x[:, :3] + torch.randn(200, 3, generator=generator)).argmax(1)
    names = [(str(strength), LogisticRegression(C=strength)) for strength in (1e-3, 1e-1, 10.0)]
    voting = VotingClassifier(names, voting="soft").fit(x.numpy(), y.numpy())
    z = torch.stack([torch.from_numpy(member.decision_function(x.numpy())) for member in voting.estimators_])
    expected = torch.from_numpy(voting.predict_proba(x.numpy()))
    assert torch.allclose(mean_logits(z).exp(), expected, atol=1e-9)
    assert float(cross_entropy(mean_logits(z), y)) == pytest.approx(log_loss(y.numpy(), expected.numpy()), rel=1e-9)
    probabilities = mean_prediction(z.softmax(-1), "probabilities")
    assert float(nll_loss(probabilities.log(), y)) == pytest.approx(log_loss(y.numpy(), expected.numpy()), rel=1e-9)


def test_log_probabilities_are_logits_and_impossible_classes_stay_impossible() -> None:
    z = logits()
    z[:, :, 0] = -math.inf
    assert torch.allclose(mean_logits(z)[:, 1:], mean_logits(z.log_softmax(-1))[:, 1:], atol=1e-6)
    assert (mean_logits(z)[:, 0] == -math.inf).all()
    assert mutual_information(z.log_softmax(-1)).isfinite().all()
    assert (log_mean_exp(z[..., 0]) == -math.inf).all()


def test_values_are_combined_leaf_by_leaf() -> None:
    outputs = [
        {"y": (torch.full((2,), v), [torch.full((1,), -v)]), "n": 3, "mask": torch.tensor([True])} for v in (1.0, 2.0)
    ]
    result = mean_values(iter(outputs))
    assert torch.equal(result["y"][0], torch.full((2,), 1.5)) and torch.equal(result["y"][1][0], torch.tensor([-1.5]))
    assert result["n"] == 3 and torch.equal(result["mask"], torch.tensor([True]))


def named(y: object, **fields: object) -> object:
    """Return a named tuple of a class of its own, as models do that make the class of their output at run time."""
    return collections.namedtuple("Output", ["y", *fields])(y, *fields.values())


def test_named_tuples_are_averaged_by_their_fields() -> None:
    outputs = [{"out": named(torch.full((2,), v), more=[torch.full((1,), -v)])} for v in (1.0, 2.0)]
    result = mean_values(outputs)["out"]
    assert type(result) is type(outputs[0]["out"]) is not type(outputs[1]["out"])
    assert torch.equal(result.y, torch.full((2,), 1.5)) and torch.equal(result.more[0], torch.tensor([-1.5]))


def test_values_in_half_precision_are_summed_in_fp32() -> None:
    outputs = torch.tensor([60000.0, 60000.0, 1.0]).half()
    assert mean_values(outputs) == pytest.approx((2 * float(outputs[0]) + 1) / 3)


def test_the_members_outputs_are_not_changed() -> None:
    z = list(logits())
    before = [output.clone() for output in z]
    for kind in ("values", "logits", "binary_logits", "probabilities"):
        mean_prediction(z, kind)
    assert all(torch.equal(a, b) for a, b in zip(z, before, strict=True))


@pytest.mark.parametrize(
    ("outputs", "kind", "sentence"),
    [
        ([torch.zeros(4), torch.zeros(4, 1)], "values", "differ in shape"),
        ([torch.zeros(4), torch.zeros(4, 1)], "binary_logits", "differ in shape"),
        ([torch.zeros(4, 2), torch.zeros(4, 3)], "logits", "differ in shape"),
        ([(torch.zeros(4),), torch.zeros(4)], "values", "differ in structure"),
        ([named(torch.zeros(4), a=torch.zeros(1)), named(torch.zeros(4), b=torch.zeros(1))], "values", "in structure"),
        ([named((torch.zeros(4),)), named([torch.zeros(4)])], "values", "differ in structure"),
        ([named(torch.zeros(4)), (torch.zeros(4),)], "values", "differ in structure"),
        ([torch.tensor([1]), torch.tensor([2])], "values", "cannot be averaged"),
        ([{"n": 1}, {"n": 2}], "values", "cannot be averaged"),
        ([torch.tensor([1.0]), torch.tensor([1])], "values", "cannot be averaged"),
        ([torch.tensor([1]), torch.tensor([1.0])], "values", "cannot be averaged"),
        ([torch.tensor([1, 1]), 1], "values", "cannot be averaged"),
        ([True, 1], "values", "cannot be averaged"),
        ([(torch.zeros(4), torch.zeros(4))], "logits", "return one tensor"),
        ([torch.zeros(4, 1)], "logits", "one class"),
        ([torch.zeros(4, 2, 3)], "logits", "dimension of the classes is not known"),
        ([], "values", "no output"),
        ([], "logits", "no output"),
        ([], "binary_logits", "no output"),
    ],
)
def test_outputs_without_a_mean_are_refused(outputs: list[object], kind: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        mean_prediction(outputs, kind)


def test_where_the_classes_are_can_be_said() -> None:
    z = torch.randn(M, 2, C, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mean_prediction(z, "logits", dim=1).exp(), z.softmax(2).mean(0), atol=1e-6)
    assert torch.allclose(mean_prediction(z, "logits", dim=-1).exp(), z.softmax(-1).mean(0), atol=1e-6)
