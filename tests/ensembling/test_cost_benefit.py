"""Compare cost_benefit with the mean of probabilities, computed directly."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot
from torch.nn.functional import nll_loss

from lightning_optim import Ensemble, cost_benefit
from lightning_optim.ensembling.cost_benefit import Cost, CostBenefit, _windows
from tests.ensembling.models import Classifier, data, loader, mean_probabilities, members, trainer
from tests.lightning import MisconfigurationException

X, Y = data().tensors


def reference(models: list[Classifier], groups: list[list[int]]) -> list[float]:
    return [float(nll_loss(mean_probabilities([models[i] for i in group], X).log(), Y)) for group in groups]


def test_the_metric_over_the_number_of_members() -> None:
    models = members()
    of = trainer()
    callbacks = list(of.callbacks)
    found = cost_benefit(models, of, loader(), monitor="nll", outputs="logits", on="net")
    assert of.callbacks == callbacks
    windows = ([[0], [1], [2]], [[0, 1], [1, 2], [2, 0]], [[0, 1, 2]])
    for size, (row, groups) in enumerate(zip(found.rows, windows, strict=True), 1):
        values = reference(models, groups)
        assert row.members == size
        expected = [sum(values) / len(values), min(values), max(values)]
        assert [row.value, row.lowest, row.highest] == pytest.approx(expected, rel=1e-5)
        assert row.seconds > 0
    assert len(models[0].seen) == 0 and [len(_windows(3, size)) for size in (1, 2, 3)] == [3, 3, 1]
    assert found.rows[0].value > found.rows[1].value > found.rows[2].value


def test_one_group_of_each_number_is_the_given_order() -> None:
    models = members()
    found = cost_benefit(models, trainer(), loader(), monitor="nll", outputs="logits", on="net", groups=1)
    expected = reference(models, [[0], [0, 1], [0, 1, 2]])
    assert [row.value for row in found.rows] == pytest.approx(expected, rel=1e-5)
    assert all(math.isnan(row.error) for row in found.rows)
    _, axes = found.plot("nll")
    assert not axes.collections, "one group says nothing of other members"


@pytest.mark.parametrize("compiled", [False, True])
def test_of_an_ensemble_the_curve_is_that_of_the_ensemble_itself(compiled: bool) -> None:
    models = members()
    served = Ensemble(models, outputs="logits", on="net")
    given = torch.compile(served, backend="eager") if compiled else served
    found = cost_benefit(given, trainer(), loader(), monitor="nll", outputs="logits", groups=1)
    expected = reference(models, [[0], [0, 1], [0, 1, 2]])
    assert [row.value for row in found.rows] == pytest.approx(expected, rel=1e-5)
    assert trainer().validate(served, loader(), verbose=False)[0]["nll"] == pytest.approx(expected[2], rel=1e-5)
    with pytest.raises(MisconfigurationException, match="is not logged"):
        cost_benefit(served, trainer(), loader(), monitor="loss", groups=1)
    assert len(served.member_outputs(X)) == 3, "all members take part again, after an error too"


def test_memory_is_that_of_the_weights_and_what_is_shared_counts_once() -> None:
    models = [Classifier(seed=seed) for seed in range(2)]
    size = sum(t.numel() * t.element_size() for t in (*models[0].parameters(), *models[0].buffers())) / 1e6
    found = cost_benefit(models, trainer(), loader(), monitor="nll", outputs="logits", on="net")
    assert [row.megabytes for row in found.rows] == pytest.approx([size, 2 * size])
    models[1].net[0] = models[0].net[0]
    shared = sum(p.numel() * p.element_size() for p in models[0].net[0].parameters()) / 1e6
    found = cost_benefit(models, trainer(), loader(), monitor="nll", outputs="logits", on="net")
    assert [row.megabytes for row in found.rows] == pytest.approx([size, 2 * size - shared])


def test_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cost_benefit(members(), trainer(), loader(), monitor="nll", outputs="logits", on="net")
    header, *lines = str(found).splitlines()
    assert header.split() == ["members", "nll", "error", "lowest", "highest", "seconds", "megabytes"]
    assert [line.split()[0] for line in lines] == ["1", "2", "3"] and len({len(line) for line in lines}) == 1
    figure, axes = found.plot()
    assert axes.get_ylabel() == "nll" and axes.lines[0].get_ydata().tolist() == [row.value for row in found.rows]
    (band,) = axes.collections
    drawn = band.get_paths()[0].vertices.tolist()
    for row in found.rows:
        for edge in (row.value - row.error, row.value + row.error):
            assert any(point == pytest.approx([row.members, edge]) for point in drawn)
    labels = ["nll", "± 1 standard error over members", f"best {found.rows[2].value:.4g}, 3 members"]
    *texts, last = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [text.partition(", within")[0] for text in texts] == labels and last == "seconds per pass over the data"
    assert figure.axes[1].lines[0].get_ydata().tolist() == [row.seconds for row in found.rows]
    assert figure.axes[1].lines[0].get_color() != axes.lines[0].get_color()
    figure.savefig(tmp_path / "cost.png")
    assert found.plot(ax=axes)[1] is axes
    sizes = found.plot("megabytes")[1]
    assert sizes.get_ylabel() == "megabytes of weights"
    assert sizes.lines[0].get_ydata().tolist() == [row.megabytes for row in found.rows]
    with pytest.raises(ValueError, match="must be one of 'nll', 'seconds', 'megabytes', got 'loss'"):
        found.plot("loss")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        found.plot()


def curve(*rows: tuple[float, float]) -> CostBenefit:
    costs = (Cost(k, value, error, value, value, 0.1 * k, 0.1 * k) for k, (value, error) in enumerate(rows, 1))
    return CostBenefit("val_loss", tuple(costs))


FLAT = ((0.45, 0.02), (0.36, 0.018), (0.325, 0.014), (0.312, 0.022), (0.305, 0.016), (0.303, 0.012), (0.304, 0.011))


@pytest.mark.parametrize(
    ("found", "label"),
    [
        (curve(*FLAT), "best 0.303, 6 members, within one standard error of 3 others"),
        (curve((0.5, 0.1), (0.45, 0.02), (0.3, 0.02)), "best 0.3, 3 members"),
        (curve((0.3, 0.1), (0.35, 0.06)), "best 0.3, 1 member, within one standard error of 1 other"),
        (curve((0.5, math.nan), (0.3, math.nan)), "best 0.3, 2 members"),
    ],
)
def test_the_mark_says_of_how_many_others_the_band_holds_the_best(found: CostBenefit, label: str) -> None:
    _, axes = found.plot()
    assert label in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize("rising", [False, True])
def test_the_legend_covers_neither_the_band_nor_the_seconds(rising: bool, style: str) -> None:
    found = curve(*((1.0 - value, error) if rising else (value, error) for value, error in FLAT))
    with pyplot.style.context(style):
        figure, axes = found.plot()
        figure.canvas.draw()
        bottom = axes.get_legend().get_window_extent().y0
        high = max(row.value + row.error for row in found.rows)
        assert axes.transData.transform((1, high))[1] < bottom
        assert figure.axes[1].transData.transform((1, max(row.seconds for row in found.rows)))[1] < bottom
        curve((2.0, 0.1), (1.5, 0.1)).plot("val_loss", ax=axes)
        assert axes.get_ylim()[1] > 2.1, "a second curve in the same axes is seen"
        pyplot.close(figure)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="`groups` must be an integer >= 1"):
        cost_benefit(members(), trainer(), loader(), monitor="nll", groups=0)
    with pytest.raises(ValueError, match="`mode` must be one of 'min', 'max', got 'least'"):
        cost_benefit(members(), trainer(), loader(), monitor="nll", mode="least")
    with pytest.raises(
        ValueError, match=r"`outputs` must be one of 'values'.*'logits'.*'binary_logits'.*'probabilities'"
    ):
        cost_benefit(members(), trainer(), loader(), monitor="nll")
    served = Ensemble(members(), outputs="logits", on="net")
    for swapped in ((served, loader(), trainer()), (trainer(), served, loader())):
        with pytest.raises(
            ValueError, match=r"`trainer` must be a Trainer, .*write `cost_benefit\(ensemble, trainer, data"
        ):
            cost_benefit(*swapped, monitor="nll")
    for contradicts in ({"outputs": "values"}, {"on": "net.4"}, {"dim": 1}):
        with pytest.raises(ValueError, match=r"is not the Ensemble's own .*: leave the argument out"):
            cost_benefit(served, trainer(), loader(), monitor="nll", **contradicts)
    of = trainer()
    with pytest.raises(MisconfigurationException, match=r"`monitor='loss'` is not logged in validation.*'nll'"):
        cost_benefit(members(), of, loader(), monitor="loss", outputs="logits", on="net")
    assert len(of.callbacks) == len(trainer().callbacks)


def test_the_members_are_not_changed() -> None:
    models = members()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    cost_benefit(models, trainer(), loader(), monitor="nll", outputs="logits", on="net")
    assert [model.training for model in models] == [True, False, True]
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
