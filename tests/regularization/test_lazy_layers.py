"""Lazy layers: parameters without a shape before the first forward pass are chosen after it like all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import (
    AGC,
    L1,
    L2,
    AutoClip,
    Centralize,
    ClipByNorm,
    GradientAccumulation,
    GradientClipping,
    GradientMonitor,
    ProximalL1,
    ScheduledDropout,
    WeightRegularization,
)
from lightning_optim.base import selection
from tests.harness.models import Batches
from tests.harness.run import Recorder
from tests.lightning import Callback, LightningModule, Trainer


class Net(LightningModule):
    """Network of a convolution, a normalization and a head, whose lazy layers get weights at the first forward pass."""

    def __init__(self, lazy: bool) -> None:
        super().__init__()
        conv, norm = (nn.LazyConv2d(3, 2), nn.LazyBatchNorm2d()) if lazy else (nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))
        self.conv, self.norm, self.head = conv, norm, nn.LazyLinear(1) if lazy else nn.Linear(12, 1)
        self.fixed = nn.Linear(1, 1)
        self.never = nn.LazyLinear(2) if lazy else None
        self.begun = False

    def forward(self, x: Tensor) -> Tensor:
        return self.fixed(self.head(torch.tanh(self.norm(self.conv(x))).flatten(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]) - 1.0).square().mean()

    def on_train_start(self) -> None:
        """Give lazy and plain layers the same weights, also those that get a shape later."""
        if not self.begun:
            self.begun = True
            for name in ("conv", "norm", "head"):
                self.get_submodule(name).register_forward_pre_hook(_fill)
            _fill(self.fixed)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return Batches([(torch.randn(4, 2, 3, 3, generator=generator),) * 2 for _ in range(4)])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@torch.no_grad()
def _fill(module: nn.Module, *_: Any) -> None:
    if not hasattr(module, "filled"):
        module.filled = True
        for parameter in module.parameters():
            parameter.copy_(torch.linspace(-0.5, 0.6, parameter.numel()).view_as(parameter))


def fit(module: Net, *callbacks: Callback, **options: Any) -> dict[str, Tensor]:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=list(callbacks), **{"logger": False, **quiet, **options}
    )
    trainer.fit(module)
    return {name: p.detach() for name, p in module.named_parameters() if not name.startswith("never")}


def assert_same(make: Any) -> None:
    """Assert that lazy and plain layers train to the same weights, which differ from those without the callbacks."""
    lazy, plain, without = fit(Net(True), *make()), fit(Net(False), *make()), fit(Net(False))
    assert all(torch.equal(lazy[name], plain[name]) for name in plain)
    assert not all(torch.equal(lazy[name], without[name]) for name in plain), "no effect"


SELECTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "all": {"on": "*"},
    "name": {"on": "conv.*"},
    "class": {"on": nn.Conv2d},
    "lazy class": {"on": nn.LazyConv2d},
    "predicate": {"on": lambda name, parameter: parameter.shape[0] == 3},
    "without a class": {"on": "*", "exclude": [nn.BatchNorm2d, nn.Linear]},
    "without a lazy class": {"on": "*", "exclude": [nn.LazyBatchNorm2d, nn.LazyLinear]},
    "without a predicate": {"on": "*", "exclude": lambda name, parameter: parameter.ndim == 1},
}


@pytest.mark.filterwarnings("ignore:.*lazy:UserWarning")
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("term", [L1, L2, ProximalL1])
def test_terms(term: Any, selection: str) -> None:
    assert_same(lambda: [WeightRegularization(term(0.1, **SELECTIONS[selection]))])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_clipping(selection: str) -> None:
    chosen = SELECTIONS[selection]
    assert_same(lambda: [GradientClipping([ClipByNorm(0.05, **chosen), AGC(0.01, **chosen)])])


@pytest.mark.parametrize("policy", [Centralize(), AutoClip(10.0, scope="tensor", on=nn.LazyConv2d), ClipByNorm(0.1)])
def test_all_of_the_callbacks_together(policy: Any) -> None:
    def make() -> list[Callback]:
        windows = GradientAccumulation(2, weight_by=lambda batch: float(batch[0][0, 0, 0, 0].abs()))
        return [GradientMonitor("parameter"), GradientClipping(policy), WeightRegularization(L2(0.1)), windows]

    assert_same(make)


def test_the_logged_penalty_is_that_of_the_step() -> None:
    recorder = Recorder()
    fit(Net(True), WeightRegularization(L2(1.0)), logger=recorder, log_every_n_steps=1, max_steps=1)
    wanted = sum(float(torch.linspace(-0.5, 0.6, size).square().sum()) for size in (24, 12, 1))
    assert recorder.logged["regularization/l2"][0] == pytest.approx(wanted, rel=1e-6)


def test_a_second_fit_chooses_the_same() -> None:
    """A lazy class still selects the layers after their first forward pass."""

    def twice(lazy: bool, on: Any) -> dict[str, Tensor]:
        module = Net(lazy)
        fit(module)
        return fit(module, WeightRegularization(L2(0.1, on=on)))

    lazy, plain = twice(True, nn.LazyConv2d), twice(False, nn.Conv2d)
    assert all(torch.equal(lazy[name], plain[name]) for name in plain)


class Counting(Callback):
    steps = 0

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize("wrong", [{"on": "convolution.*"}, {"on": nn.LazyConv1d}, {"on": "*", "exclude": nn.LSTM}])
@pytest.mark.parametrize(
    "make",
    [lambda **chosen: WeightRegularization(L2(0.1, **chosen)), lambda **c: GradientClipping(ClipByNorm(1.0, **c))],
)
def test_a_selection_without_a_match_is_refused_before_the_first_step(make: Any, wrong: dict[str, Any]) -> None:
    counting = Counting()
    with pytest.raises(ValueError, match=r"matches no parameter of Net[;.] .*Its (parameters|modules): '"):
        fit(Net(True), make(**wrong), counting)
    assert counting.steps == 0


@pytest.mark.parametrize("rates", [{"conv": 1.0}, {"norm": 1.0, "*": 0.0}, {"c*": 1.0, "*": 0.0}])
def test_inserted_dropout(rates: dict[str, float]) -> None:
    """Dropout is inserted from the first batch on, after the same layers; after a normalization only if it is named."""
    assert_same(lambda: [ScheduledDropout(rates, insert=True)])


def test_a_glob_of_dropout_takes_layers_and_no_normalization() -> None:
    with pytest.raises(ValueError, match=r"rates\['no\*'\]"):
        fit(Net(True), ScheduledDropout({"no*": 0.5}, insert=True))


def test_selection_is_renewed_when_a_parameter_gets_its_shape() -> None:
    model = nn.ModuleDict({"first": nn.LazyLinear(3), "then": nn.LazyLinear(1), "last": nn.Linear(2, 2)})
    default, named = selection.Selection(model), selection.Selection(model, on="*.weight")
    weights = [id(model[name].weight) for name in model]
    assert default.ids == default.existing == {weights[2]}
    assert named.ids == set(weights)
    assert named.existing == {weights[2]}
    hidden = model["first"](torch.zeros(1, 4))
    assert default.ids == default.existing == named.existing == {weights[0], weights[2]}
    model["then"](hidden)
    assert default.ids == default.existing == named.existing == set(weights)
