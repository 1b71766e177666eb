"""ScheduledDropout: rates by layer, the mask, inserted dropout, and the module as before after the fit."""

from __future__ import annotations

import copy
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_optim
from lightning_optim import DropPath, Linear, Piecewise, ScheduledDropout
from lightning_optim.regularization.dropout.masks import mask
from lightning_optim.regularization.dropout.sites import find_sites
from tests.lightning import Callback, LightningModule, MisconfigurationException, Trainer


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), DropPath(0.2))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.Linear(8, 1))
        self.rates: list[tuple[float, float, float]] = []
        self.fail_at = -1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rates.append((self.encoder[1].p, self.encoder[3].drop_prob, self.head[1].p))
        if len(self.rates) - 1 == self.fail_at:
            raise RuntimeError("broken")
        return self.head(self.encoder(batch)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(8, 4), batch_size=2)


def fit(model: LightningModule, *callbacks: Any, epochs: int = 1) -> None:
    Trainer(max_epochs=epochs, barebones=True, callbacks=list(callbacks)).fit(model)


def test_first_matching_pattern_wins_and_originals_come_back() -> None:
    model = Net()
    fit(model, ScheduledDropout({"encoder.3": 0.1, "encoder.*": 0.5, "head.*": 0.6}))
    assert model.rates == [(0.5, 0.1, 0.6)] * 4
    assert (model.encoder[1].p, model.encoder[3].drop_prob, model.head[1].p) == (0.3, 0.2, 0.4)


def test_rate_follows_its_schedule_by_optimizer_steps() -> None:
    model = Net()
    fit(model, ScheduledDropout({"encoder.*": Linear(0.7, 0.0), "head.*": Piecewise({0.0: 0.5, 0.5: 0.0})}), epochs=2)
    assert [rates[0] for rates in model.rates] == pytest.approx([0.7 * (1 - step / 7) for step in range(8)])
    assert [rates[2] for rates in model.rates] == [0.5] * 4 + [0.0] * 4


@pytest.mark.parametrize("rate", [0.25, Linear(0.7, 0.0)], ids=repr)
def test_one_rate_is_that_of_all_modules(rate: Any) -> None:
    models = []
    for rates in (rate, {"*": rate}):
        torch.manual_seed(0)
        models.append(Net())
        fit(models[-1], ScheduledDropout(rates, insert=True))
    one, by_pattern = models
    assert one.rates == by_pattern.rates and one.rates[0] == (one.rates[0][0],) * 3
    assert torch.equal(one.head[0].weight, by_pattern.head[0].weight)


def test_originals_come_back_after_an_exception() -> None:
    model = Net()
    model.fail_at = 2
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, ScheduledDropout({"*": 0.9}, insert=True))
    assert (model.encoder[1].p, model.encoder[3].drop_prob, model.head[1].p) == (0.3, 0.2, 0.4)
    assert not any(module._forward_hooks for module in model.modules())


def test_inserted_dropout_acts_in_training_only_and_leaves_no_trace() -> None:
    class Probed(Net):
        outputs: list[Tensor]

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.outputs = [self.head[0](torch.ones(4000, 8)), self.eval().head[0](torch.ones(4000, 8))]
            self.train()
            return super().training_step(batch, batch_idx)

    model = Probed()
    keys = list(model.state_dict())
    fit(model, ScheduledDropout({"head.0": 0.25}, insert=True))
    dropped, plain = model.outputs
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], plain[kept] / 0.75)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())


def test_mask_has_mean_one_and_its_scale() -> None:
    drawn = mask(torch.empty(200_000), 0.3)
    assert drawn.mean().item() == pytest.approx(1.0, abs=0.01)
    assert sorted(set(drawn.tolist())) == pytest.approx([0.0, 1 / 0.7])
    assert not mask(torch.empty(10), 1.0).any()


@pytest.mark.parametrize("rate", [0.25, 1.0, torch.tensor(0.25)])
def test_the_mask_of_a_complex_tensor_keeps_both_parts_or_none(rate: Any) -> None:
    dropped = torch.full((1000,), 3.0 + 4.0j) * mask(torch.empty(1000, dtype=torch.complex64), rate)
    assert {round(size, 3) for size in dropped.abs().tolist()} <= {0.0, 6.667}
    assert dropped.dtype == torch.complex64


def test_drop_path_drops_whole_samples() -> None:
    dropped = DropPath(0.5)(torch.ones(1000, 3, 2)).flatten(1)
    assert set(dropped[:, 0].tolist()) == {0.0, 2.0}
    assert (dropped == dropped[:, :1]).all()
    assert dropped[:, 0].mean().item() == pytest.approx(1.0, abs=0.15)


def test_sites_of_attention_and_recurrent_layers() -> None:
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(4, 2, dropout=0.1), "lstm": nn.LSTM(4, 4, 2, dropout=0.1)}
    )
    found = find_sites(model, ["*"], insert=True)["*"].sites
    assert [(site.name, site.attribute) for site in found] == [("attention", "dropout"), ("lstm", "dropout")]


def names(found: Any) -> dict[str, list[str]]:
    return {pattern: [site.name for site in sites.sites] for pattern, sites in found.items()}


def test_a_glob_leaves_out_the_last_layer_if_it_matches_another() -> None:
    """Its outputs are the predictions. A pattern that names it, or matches it alone, takes it."""
    model = Net()
    inserted = find_sites(model, ["head.*", "*"], insert=True)
    assert names(inserted) == {"head.*": ["head.0", "head.1"], "*": ["encoder.0", "encoder.1", "encoder.3"]}
    assert (inserted["head.*"].left_out, inserted["*"].left_out) == ("head.2", "head.2")
    assert names(find_sites(model, ["head.2", "*"], insert=True))["head.2"] == ["head.2"]
    assert names(find_sites(model, ["*.2", "*"], insert=True))["*.2"] == ["head.2"]
    assert find_sites(model, ["*.2", "*"], insert=True)["*"].left_out == ""
    assert names(find_sites(nn.Sequential(nn.Linear(1, 1)), ["*"], insert=True)) == {"*": ["0"]}
    assert names(find_sites(model, ["*"], insert="weight"))["*"][-1] == "head.2"


def test_the_last_layer_keeps_its_outputs() -> None:
    class Outputs(Net):
        zeros = 0

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.zeros += int((self.head[2](torch.ones(1000, 8)) == 0).sum())
            return super().training_step(batch, batch_idx)

    model = Outputs()
    callback = ScheduledDropout(0.5, insert=True)
    fit(model, callback)
    assert model.zeros == 0
    assert "head.0" in callback.rates_by_module() and "head.2" not in callback.rates_by_module()
    fit(model, ScheduledDropout({"head.2": 0.5, "*": 0.1}, insert=True))
    assert model.zeros > 0


def test_rates_by_module_and_the_report() -> None:
    model, callback = Net(), ScheduledDropout({"encoder.3": Linear(0.8, 0.125), "*": 0.5})
    assert callback.rates_by_module() == {}
    seen: list[dict[str, float]] = []

    class Looks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(callback.rates_by_module())

        def on_fit_end(self, *_: Any) -> None:
            seen.append({"report": callback.report()})  # type: ignore[dict-item]

    fit(model, callback, Looks())
    assert seen[0] == {"encoder.3": 0.8, "encoder.1": 0.5, "head.1": 0.5}
    assert seen[-1] == {"report": "dropout at the end: encoder.3 0.125, encoder.1 0.5, head.1 0.5"}
    assert callback.rates_by_module() == seen[-2] == {"encoder.3": 0.125, "encoder.1": 0.5, "head.1": 0.5}
    assert copy.deepcopy(callback).rates_by_module() == callback.rates_by_module()
    assert pickle.loads(pickle.dumps(callback)).rates_by_module() == callback.rates_by_module()


def test_a_long_report_is_cut() -> None:
    class Deep(Net):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.ModuleList(nn.Dropout() for _ in range(9))

    callback = ScheduledDropout(0.25)
    fit(Deep(), callback)
    shown = (
        "encoder.1 0.25, encoder.3 0.25, head.1 0.25, more.0 0.25, more.1 0.25, more.2 0.25, more.3 0.25, more.4 0.25"
    )
    assert callback.report() == f"dropout at the end: {shown}, … and 4 more"


def test_layers_that_are_replaced_are_followed() -> None:
    """From the first batch of the epoch on; what is replaced gets its own rate back, and nothing stays installed."""

    class Replaces(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.old = [self.head]
                self.head = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.45), nn.Linear(8, 4), nn.Linear(4, 1))

    model = Replaces()
    callback = ScheduledDropout({"head.*": Linear(0.7, 0.0), "*": 0.25}, insert=True)
    fit(model, callback, epochs=2)
    assert [rates[2] for rates in model.rates] == pytest.approx([0.7 * (1 - step / 7) for step in range(8)])
    assert callback.rates_by_module().keys() == {
        *("head.0", "head.1", "head.2"),
        *("encoder.0", "encoder.1", "encoder.3"),
    }
    assert (model.head[1].p, model.old[0][1].p) == (0.45, 0.4)
    assert not any(module._forward_hooks for root in (model, *model.old) for module in root.modules())
    constant = Replaces()
    fit(constant, ScheduledDropout({"head.*": 0.3}), epochs=2)
    assert [rates[2] for rates in constant.rates] == [0.3] * 8


def test_recipes_of_the_page() -> None:
    """Early, late and curriculum dropout: rates over a run of 101 steps."""
    early, late = Piecewise({0.0: 0.1, 0.2: 0.0}), Piecewise({0.0: 0.0, 0.2: 0.1})
    assert [early(step, 101) for step in (0, 19, 20, 100)] == [0.1, 0.1, 0.0, 0.0]
    assert [late(step, 101) for step in (0, 19, 20, 100)] == [0.0, 0.0, 0.1, 0.1]
    page = (Path(lightning_optim.__file__).parents[1] / "docs" / "techniques" / "dropout.md").read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Curriculum" in code]
    scope: dict[str, Any] = {}
    exec(code.partition("trainer =")[0], scope)
    schedule = scope["Curriculum"](0.5)
    for step in (0, 10, 100):
        keep = (1.0 - 0.5) * math.exp(-10.0 / 100 * step) + 0.5
        assert schedule(step, 101) == pytest.approx(1.0 - keep)


def test_a_pattern_without_dropout_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="insert=True"):
        fit(Net(), ScheduledDropout({"head.0": 0.1}))
    with pytest.raises(ValueError, match="encoder"):
        fit(Net(), ScheduledDropout({"encodr.*": 0.1}))


def test_outputs_of_a_parametrized_layer_are_dropped_and_not_its_weights() -> None:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.encoder[0])
    plain = ScheduledDropout({"encoder.*": 0.5}, insert=True)
    fit(model, plain)
    assert list(plain.rates_by_module()) == ["encoder.0", "encoder.1", "encoder.3"]


def test_a_module_may_have_an_attribute_of_that_name() -> None:
    model = Net()
    model.encoder[0].parametrizations = {"weight": "none"}
    plain = ScheduledDropout({"encoder.*": 0.5}, insert=True)
    fit(model, plain)
    assert list(plain.rates_by_module()) == ["encoder.0", "encoder.1", "encoder.3"]


def test_an_output_that_is_no_tensor_is_refused_with_its_name() -> None:
    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(4, 4)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.cell(batch)[0].mean()

    with pytest.raises(MisconfigurationException, match="'cell' returns tuple"):
        fit(Recurrent(), ScheduledDropout({"cell": 0.1}, insert=True))


@pytest.mark.parametrize("insert", ["blocks", 1, None])
def test_wrong_insert(insert: Any) -> None:
    with pytest.raises(ValueError, match="`insert` must be one of True, False, 'block', 'weight'"):
        ScheduledDropout(0.1, insert=insert)


@pytest.mark.parametrize("rates", [{}, -0.1, {"*": 1.5}, {"*": -0.1}, {"*": Linear(0.0, 2.0)}])
def test_wrong_rates(rates: Any) -> None:
    with pytest.raises(ValueError, match="rates"):
        ScheduledDropout(rates)


def test_a_schedule_needs_a_finite_run() -> None:
    trainer = Trainer(max_epochs=-1, barebones=True, callbacks=[ScheduledDropout({"*": Linear(0.5, 0.0)})])
    with pytest.raises(MisconfigurationException, match="max_steps"):
        trainer.fit(Net())
