"""Compare Disagreement with brute force over pairs, also with several processes."""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from lightning_optim import Disagreement
from tests.harness.process_group import Group


def brute_force(labels: torch.Tensor) -> float:
    pairs = list(itertools.combinations(labels.flatten(1).tolist(), 2))
    differing = [a != b for one, other in pairs for a, b in zip(one, other, strict=True)]
    return sum(differing) / len(differing)


def labels(members: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, classes, (members, 50), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("members", [2, 3, 7])
@pytest.mark.parametrize("classes", [1, 2, 30])
def test_the_share_of_pairs_that_differ(members: int, classes: int) -> None:
    metric = Disagreement()
    parts = [labels(members, classes, seed) for seed in range(3)]
    for part in parts:
        metric.update(part)
    assert float(metric.compute()) == pytest.approx(brute_force(torch.cat(parts, 1)))


def test_any_integers_and_any_shape() -> None:
    maps = torch.randint(-5, 5, (4, 3, 6, 2), generator=torch.Generator().manual_seed(0)) * 10**9
    assert float(Disagreement()(maps)) == pytest.approx(brute_force(maps))


def test_the_labels_of_scores() -> None:
    scores = torch.randn(4, 20, 3, 2, generator=torch.Generator().manual_seed(0))
    assert float(Disagreement()(scores)) == pytest.approx(brute_force(scores.argmax(2)))


def test_a_list_of_the_members_predictions_is_stacked() -> None:
    scores = list(torch.randn(4, 20, 3, generator=torch.Generator().manual_seed(0)))
    for given in (scores, tuple(scores), [one.argmax(1) for one in scores]):
        assert float(Disagreement()(given)) == pytest.approx(brute_force(torch.stack(scores).argmax(2)))


def test_copies_agree_and_no_two_of_these_do() -> None:
    assert float(Disagreement()(labels(1, 5).repeat(4, 1))) == 0.0
    assert float(Disagreement()(torch.arange(4).view(4, 1).repeat(1, 9))) == 1.0


def test_mutual_information_by_entropies() -> None:
    p = torch.randn(5, 40, 3, 2, generator=torch.Generator().manual_seed(0)).mul(2).softmax(2)
    total = torch.special.entr(p.double().mean(0)).sum(1)
    expected = (total - torch.special.entr(p.double()).sum(2).mean(0)).mean()
    assert float(Disagreement("mutual_information")(p)) == pytest.approx(float(expected), rel=1e-5)
    assert float(Disagreement("mutual_information", outputs="logits")(p.log())) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_mutual_information_of_opposite_members_is_log_m() -> None:
    assert float(Disagreement("mutual_information")(torch.eye(4).view(4, 1, 4))) == pytest.approx(math.log(4))


@pytest.mark.parametrize("measure", ["pairwise", "mutual_information"])
def test_values_have_no_gradients(measure: str) -> None:
    p = torch.randn(3, 8, 5, requires_grad=True).softmax(-1)
    metric = Disagreement(measure)
    assert not metric(p).requires_grad and not metric.is_differentiable
    metric.update(p)
    assert not metric.compute().requires_grad and not metric.total.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_of_many_classes_in_half_precision_are_probabilities(dtype: torch.dtype) -> None:
    p = (3 * torch.randn(3, 50, 1000, generator=torch.Generator().manual_seed(0))).softmax(-1)
    exact = float(Disagreement("mutual_information")(p))
    assert float(Disagreement("mutual_information")(p.to(dtype))) == pytest.approx(exact, rel=0.02)


def test_members_that_diverged_give_nan() -> None:
    p = torch.full((2, 3, 4), 0.25)
    p[0, 0] = float("nan")
    assert Disagreement("mutual_information")(p).isnan()


def test_logits_in_half_precision_do_not_overflow() -> None:
    z = (40 * torch.randn(3, 100, 5, generator=torch.Generator().manual_seed(0))).half()
    expected = Disagreement("mutual_information", outputs="logits")(z.double())
    assert float(Disagreement("mutual_information", outputs="logits")(z)) == pytest.approx(float(expected))


def compute_on_a_rank(measure: str) -> float:
    rank = torch.distributed.get_rank()
    metric = Disagreement(measure)
    z = torch.randn(3, 10 + 20 * rank, 4, generator=torch.Generator().manual_seed(rank))
    metric.update(z.softmax(2))
    return float(metric.compute())


@pytest.mark.parametrize("measure", ["pairwise", "mutual_information"])
def test_processes_add_up(measure: str, group: Group) -> None:
    whole = Disagreement(measure)
    for rank in range(2):
        z = torch.randn(3, 10 + 20 * rank, 4, generator=torch.Generator().manual_seed(rank))
        whole.update(z.softmax(2))
    assert group.run(compute_on_a_rank, measure) == pytest.approx([float(whole.compute())] * 2)


def test_reset_pickle_and_plot() -> None:
    metric = Disagreement()
    metric.update(labels(3, 4))
    again = pickle.loads(pickle.dumps(metric))
    assert again.compute() == metric.compute()
    figure, axes = metric.plot()
    assert axes in figure.axes
    metric.reset()
    metric.update(labels(2, 1))
    assert metric.compute() == 0


@pytest.mark.parametrize(
    ("arguments", "predictions", "sentence"),
    [
        ({"measure": "kappa"}, None, "`measure` must be one of 'pairwise', 'mutual_information'"),
        ({"outputs": "labels"}, None, "`outputs` must be one of 'probabilities', 'logits'"),
        ({}, torch.zeros(1, 5, dtype=torch.long), "at least two members"),
        ({}, torch.zeros(3, dtype=torch.long), r"got torch.int64 of shape \[3\]"),
        ({}, torch.zeros(3, 5), "scores"),
        ({"measure": "mutual_information"}, torch.zeros(3, 5, dtype=torch.long), "needs probabilities"),
        ({"measure": "mutual_information"}, torch.rand(3, 5, 4), 'no probabilities: .*`outputs="logits"`'),
        ({"measure": "mutual_information"}, torch.full((3, 5, 4), 0.275), "no probabilities"),
        ({"measure": "mutual_information"}, torch.tensor([1.5, -0.5]).expand(3, 5, 2), "no probabilities"),
        ({}, torch.rand(3, 5, 1), "scores of one class"),
        ({}, [torch.rand(5, 2), torch.rand(4, 2)], r"for each member, .* got a list of \[5, 2\], \[4, 2\]"),
        ({}, [{"logits": torch.rand(5, 2)}] * 2, "got a list of dict, dict"),
        ({}, [], "got a list"),
        ({}, np.zeros((3, 5)), "got a ndarray"),
        ({"measure": "mutual_information", "outputs": "logits"}, torch.rand(3, 5, 1), "scores of one class"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, str], predictions: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Disagreement(**arguments).update(predictions)
