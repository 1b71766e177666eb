"""Shares of exact zeros: in the log, in the history, as a table, over shards and over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_optim import EMA, L1, L2, ProximalL1, WeightAveraging, WeightRegularization, sparsity
from lightning_optim.base import nonzero_counts
from lightning_optim.regularization.sparsity_table import Sparsity
from lightning_optim.regularization.term_history import TermHistory
from tests.harness.process_group import Group
from tests.lightning import BoringModel, LightningModule, Trainer


class Two(BoringModel):
    """Two layers, of which the second is trained too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(WeightRegularization):
    """Compare the shares that are measured with those of the weights at that moment."""

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        super().on_after_optimizer_step(trainer, pl_module, optimizer)
        found = getattr(self, "found", {})
        named = pl_module.named_parameters()
        self.found = {**found, self.steps[0]: {name: share_of(weight) for name, weight in named if weight.ndim > 1}}


def share_of(weight: Tensor) -> float:
    return float((weight == 0).double().mean())


def fit(*callbacks: Any, steps: int = 6, ckpt_path: Path | None = None) -> tuple[Two, Trainer]:
    off: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    off |= {"enable_checkpointing": False, "limit_val_batches": 0, "accelerator": "cpu"}
    trainer, model = Trainer(max_steps=steps, callbacks=list(callbacks), log_every_n_steps=2, **off), Two()
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer


def test_shares_are_those_of_the_weights_after_the_step() -> None:
    callback = Seen([ProximalL1(0.05, on="layer.0.weight"), L2(1e-3)])
    model, trainer = fit(callback)
    steps, values = callback._histories[0].values()
    assert steps == [2, 4, 6]
    assert set(values) == {"regularization/l2", "regularization/zeros", "regularization/zeros/layer.0.weight"}
    shares = [callback.found[step]["layer.0.weight"] for step in (2, 4, 6)]
    assert values["regularization/zeros/layer.0.weight"].tolist() == pytest.approx(shares)
    assert 0.0 < shares[0] < shares[-1] < 1.0
    assert trainer.callback_metrics["regularization/zeros"].item() == pytest.approx(shares[-1])
    assert share_of(model.layer[0].weight) == pytest.approx(shares[-1])


def test_penalties_have_no_shares() -> None:
    callback = WeightRegularization(L1(0.1))
    _, trainer = fit(callback)
    assert not [name for name in trainer.callback_metrics if "zeros" in name]
    assert callback.report() == ""


def test_the_history_goes_on_after_a_resume(tmp_path: Path) -> None:
    whole, first, second = (WeightRegularization([L1(0.01), ProximalL1(0.05)]) for _ in range(3))
    fit(whole)
    _, trainer = fit(first, steps=4)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    fit(second, ckpt_path=tmp_path / "four.ckpt")
    steps, values = second._histories[0].values()
    wanted_steps, wanted = whole._histories[0].values()
    assert steps == wanted_steps and values.keys() == wanted.keys()


def test_a_value_that_comes_later_is_unknown_before() -> None:
    history = TermHistory()
    history.append(1, {"a": torch.tensor(1.0)})
    history.append(2, {"b": torch.tensor(2.0), "a": torch.tensor(3.0)})
    steps, values = TermHistory.loaded(history.state_dict()).values()
    assert steps == [1, 2] and values["a"].tolist() == [1.0, 3.0]
    assert values["b"].isnan().tolist() == [True, False] and values["b"][1] == 2.0


def test_an_average_has_fewer_zeros_and_the_report_counts_those_of_the_module() -> None:
    alone, _ = fit(WeightRegularization(ProximalL1(0.2)))
    averaged, _ = fit(WeightRegularization(ProximalL1(0.2)), WeightAveraging(EMA(0.5)))
    assert sparsity(alone).share > sparsity(averaged).share
    assert Sparsity.of({"w": torch.tensor([0.0, 1.0, 0.0])}).in_words == "66.7 % of 3 weights are zero"


def test_the_table() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.LayerNorm(3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[2].weight[0, 0] = -0.0
    table = sparsity(model)
    assert [(row.name, row.weights, row.zeros, row.rows, row.zero_rows) for row in table] == [
        ("0.weight", 24, 8, 3, 1),
        ("2.weight", 6, 1, 2, 0),
    ]
    assert table.share == pytest.approx(9 / 30) and table.rows[0].share == pytest.approx(1 / 3)
    lines = str(table).splitlines()
    assert len(lines) == 4 and len(set(map(len, lines))) == 1
    assert lines[-1].split() == ["all", "30", "9", "0.300", "5", "1"]
    assert [row.name for row in sparsity(model, on="*")] == [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="matches no parameter"):
        sparsity(model, on="head")


def test_a_model_without_weights_has_an_empty_table() -> None:
    table = sparsity(nn.ReLU())
    assert table.share == 0.0 and not list(table) and "all" in str(table)


def _on_shards() -> tuple[list[int], list[int]]:
    mesh = init_device_mesh("cpu", (2,))
    whole = [torch.ones(5, 3), torch.zeros(1, 2), torch.eye(4), torch.eye(3), torch.zeros(4, 4)]
    places = [Shard(0), Shard(0), Shard(1), Replicate()]
    placed = [distribute_tensor(w, mesh, [p]) for w, p in zip(whole, places, strict=False)] + whole[4:]
    return nonzero_counts(placed).tolist(), nonzero_counts(whole).tolist()


def test_counts_are_exact_on_shards(group: Group) -> None:
    for placed, whole in group.run(_on_shards):
        assert placed == whole == [15, 0, 4, 3, 0]
