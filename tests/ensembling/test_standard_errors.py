"""Compare the standard errors of cost_benefit's curve with the spread of curves of many sets of members."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from lightning_optim.ensembling.cost_benefit import _windows
from lightning_optim.ensembling.standard_errors import standard_errors

MEMBERS, SETS = 6, 2000


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("metric", ["linear", "squared"])
def test_the_error_is_the_spread_of_the_curve_over_sets_of_members(metric: str, groups: int | None) -> None:
    drawn = torch.randn(SETS, MEMBERS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curves, squares = [], []
    windows = [_windows(MEMBERS, size)[:groups] for size in range(1, MEMBERS + 1)]
    for members in drawn.mul(0.1).add(1.0):
        means = [[members[list(group)].mean() for group in level] for level in windows]
        values = [[float(m if metric == "linear" else m.square()) for m in level] for level in means]
        curves.append([statistics.fmean(level) for level in values])
        squares.append([error**2 for error in standard_errors(list(zip(windows, values, strict=True)))])
    for size in range(MEMBERS):
        spread = statistics.stdev(curve[size] for curve in curves)
        estimate = math.sqrt(statistics.fmean(square[size] for square in squares))
        assert estimate == pytest.approx(spread, rel=0.06), f"{size + 1} members"


@pytest.mark.parametrize(("metric", "widest"), [("loss", 1.35), ("accuracy", 2.0)])
def test_of_a_metric_that_is_no_mean_of_members_it_errs_on_the_wide_side(metric: str, widest: float) -> None:
    """Members predict 50 numbers; the metric is that of their mean prediction, as in an ensemble."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(50, generator=generator).mul(0.5)
    predictions = bias + 0.7 * torch.randn(400, 5, 50, generator=generator)

    def of(mean: torch.Tensor) -> float:
        return float(mean.square().mean() if metric == "loss" else (mean.abs() < 1.0).float().mean())

    windows = [_windows(5, size) for size in range(1, 6)]
    curves, squares = [], []
    for members in predictions:
        values = [[of(members[list(group)].mean(0)) for group in level] for level in windows]
        curves.append([statistics.fmean(level) for level in values])
        squares.append([error**2 for error in standard_errors(list(zip(windows, values, strict=True)))])
    for size in range(5):
        spread = statistics.stdev(curve[size] for curve in curves)
        ratio = math.sqrt(statistics.fmean(square[size] for square in squares)) / spread
        assert 0.9 < ratio < widest, f"{size + 1} members: {ratio}"


def test_the_last_error_is_the_jackknife() -> None:
    groups, values = _windows(4, 3), [1.0, 2.0, 4.0, 1.5]
    singles = ([(0,), (1,), (2,), (3,)], [3.0, 1.0, 2.0, 5.0])
    found = standard_errors(
        [singles, (_windows(4, 2), [1.0, 1.0, 2.0, 3.0]), (groups, values), ([(0, 1, 2, 3)], [9.0])]
    )
    assert found[0] == pytest.approx(statistics.stdev(singles[1]) / 2.0)
    mean = statistics.fmean(values)
    assert found[3] == pytest.approx(math.sqrt(3 / 4 * sum((value - mean) ** 2 for value in values)))
    assert found[3] == pytest.approx(found[2])


def test_one_member_and_one_group_have_no_error() -> None:
    assert math.isnan(standard_errors([([(0,)], [1.0])])[0])
    assert all(map(math.isnan, standard_errors([([(0,)], [1.0]), ([(0, 1)], [2.0])])))
    (error,) = standard_errors([([(0,), (1,)], [math.inf, 1.0])])
    assert not math.isfinite(error)
