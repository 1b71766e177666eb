"""Scheduled dropout in compiled modules: no compilation for a new rate, and the values of torch's own dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim import DropBlock, DropPath, Linear, Piecewise, ScheduledDropout, WeightDrop
from lightning_optim.regularization.dropout.compiled_rates import LEVELS, forward_at, levels, rate_tensor
from tests.lightning import LightningModule, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:dropout2d. Received a 3D input")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """Count the graphs that are compiled, and how often one is run."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


class Net(LightningModule):
    """Train one network for eight steps."""

    def __init__(self, net: nn.Module, size: tuple[int, ...] = (4, 4)) -> None:
        super().__init__()
        self.net, self.size = net, size
        self.rates: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(8 * self.size[0], *self.size[1:]), batch_size=self.size[0])


class TimmDropPath(nn.Module):
    """As in timm: another class of the name ``DropPath``."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        drawn = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (drawn.div_(keep) if keep > 0.0 and self.scale_by_keep else drawn)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Chain(nn.Sequential):
    """A class of a user: torch compiles no ``forward`` of its own modules in place."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


FLAT, MAPS = (4, 4), (4, 3, 6, 6)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Dropout": (lambda: nn.Dropout(0.1), FLAT),
    "inplace": (lambda: nn.Dropout(0.1, inplace=True), FLAT),
    "Dropout1d": (lambda: nn.Dropout1d(0.1), (4, 3, 4)),
    "Dropout2d": (lambda: nn.Dropout2d(0.1), MAPS),
    "Dropout3d": (lambda: nn.Dropout3d(0.1), (4, 3, 2, 2, 2)),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.1), FLAT),
    "FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(0.1), MAPS),
    "DropPath": (lambda: DropPath(0.1), FLAT),
    "timm's DropPath": (lambda: TimmDropPath(0.1), FLAT),
    "DropBlock": (lambda: DropBlock(0.1, 3), MAPS),
    "WeightDrop": (lambda: WeightDrop(nn.Linear(4, 4), 0.1), FLAT),
}


def compilations(net: nn.Module, size: tuple[int, ...], callback: ScheduledDropout, how: str) -> tuple[int, Net]:
    """Return the number of graphs that a fit compiles."""
    backend = Backend()
    model = Net(Chain(nn.Linear(size[-1], size[-1]), net), size)
    fitted: Any = model
    if how == "whole":
        fitted = torch.compile(model, backend=backend)
    elif how == "in place":
        model.net.compile(backend=backend)
    else:
        model.net = torch.compile(model.net, backend=backend)  # type: ignore[assignment]
    keys = list(model.state_dict())
    Trainer(max_epochs=1, barebones=True, callbacks=[callback]).fit(fitted)
    assert list(model.state_dict()) == keys
    return backend.graphs, model


@pytest.mark.parametrize(
    ("name", "how"), [("Dropout", "whole"), ("Dropout", "in place"), *((name, "submodule") for name in NETS)]
)
def test_a_new_rate_compiles_nothing(name: str, how: str) -> None:
    make, size = NETS[name]
    net = make()
    own = getattr(net, "p", getattr(net, "drop_prob", None))
    first, _ = compilations(make(), size, ScheduledDropout({"net*": 0.3}), how)
    graphs, model = compilations(net, size, ScheduledDropout({"net*": Linear(0.8, 0.1)}), how)
    assert 0 < graphs <= first
    assert "forward" not in vars(net) and getattr(net, "p", getattr(net, "drop_prob", None)) == own
    assert not [module for module in model.modules() if module._forward_hooks]


@pytest.mark.parametrize("insert", [True, "block", "weight"])
def test_a_new_rate_of_inserted_dropout_compiles_nothing(insert: Any) -> None:
    layer, size = (nn.Conv2d(3, 3, 1), MAPS) if insert == "block" else (nn.Linear(4, 4), FLAT)
    graphs = {}
    for rate in (0.3, Linear(0.8, 0.0)):
        net = nn.Sequential(layer, nn.ReLU())
        pattern = {"net.1.0": rate}
        graphs[rate], _ = compilations(net, size, ScheduledDropout(pattern, insert=insert), "whole")
        assert "forward" not in vars(layer) and not layer._forward_hooks
    one, moving = graphs.values()
    assert 0 < moving <= one


@pytest.mark.parametrize("insert", [True, "weight"])
@pytest.mark.parametrize("how", ["submodule", "layer", "in place", "whole"])
def test_inserted_dropout_acts_in_code_that_was_compiled_before_and_not_after_the_fit(how: str, insert: Any) -> None:
    class Counts(Net):
        """Note the share of zeros in the outputs: all of them at a rate of 1."""

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            outputs = self(batch)
            self.note(outputs)
            return outputs.square().mean()

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def note(self, outputs: Tensor) -> None:
            self.rates.append((outputs == 0.0).float().mean().item())

    model = Counts(Chain(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)))
    fitted: Any = model
    if how == "whole":
        fitted = torch.compile(model, backend="eager")
    elif how == "in place":
        model.net.compile(backend="eager")
    elif how == "layer":
        model.net[1] = torch.compile(model.net[1], backend="eager")  # type: ignore[index, operator]
    else:
        model.net = torch.compile(model.net, backend="eager")  # type: ignore[assignment]
    for callbacks in ([], [ScheduledDropout({"net.1": 1.0}, insert=insert)], []):
        Trainer(max_epochs=1, barebones=True, callbacks=callbacks).fit(fitted)
    assert model.rates == [0.0] * 8 + [1.0] * 8 + [0.0] * 8


class Validated(Net):
    """Count the passes, of which every third is a validation."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


@pytest.mark.filterwarnings("ignore:The dataloader, val_dataloader")
def test_attention_gets_few_rates_so_that_torch_keeps_compiling() -> None:
    backend = Backend()
    model = Validated(Attends(), (2, 3, 4))
    model.net.compile(backend=backend)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"val_check_interval": 2, "limit_val_batches": 1, "accelerator": "cpu", "max_epochs": 4}
    Trainer(callbacks=[ScheduledDropout(Linear(0.8, 0.1))], **options).fit(model)
    assert backend.graphs == LEVELS + 1
    assert backend.runs == model.passes > 48, "torch has given up compiling"
    assert model.net.attention.dropout == 0.1  # type: ignore[union-attr]


def test_attention_keeps_the_values_of_a_schedule_that_has_few() -> None:
    first, _ = compilations(Attends(), (2, 3, 4), ScheduledDropout(0.3), "submodule")
    torch._dynamo.reset()
    few, _ = compilations(Attends(), (2, 3, 4), ScheduledDropout(Piecewise({0.0: 0.3, 0.5: 0.1})), "submodule")
    assert few == first + 1


def test_a_compiled_module_drops_at_the_rate_of_the_step_and_has_its_own_after_the_fit() -> None:
    class Counts(Net):
        def __init__(self) -> None:
            super().__init__(Chain(nn.Dropout(0.9)))
            self.layer = nn.Linear(1, 1)
            self.shares: list[float] = []
            self.net.compile(backend="eager")

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.shares.append((self.net(torch.ones(50_000)) == 0.0).float().mean().item())
            return self.layer(torch.ones(1)).sum()

    model = Counts()
    Trainer(max_epochs=1, barebones=True, callbacks=[ScheduledDropout(Linear(1.0, 0.0))]).fit(model)
    assert model.shares == pytest.approx([1.0 - step / 7 for step in range(8)], abs=0.01)
    assert model.shares[0] == 1.0 and model.shares[-1] == 0.0
    assert (model.net(torch.ones(50_000)) == 0.0).float().mean().item() == pytest.approx(0.9, abs=0.01)


def test_levels() -> None:
    assert len(levels(Linear(0.0, 0.5), 100_000)) == LEVELS
    assert levels(Linear(0.0, 0.6), 1000) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert levels(Linear(0.5, 0.2), 4) == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert levels(Piecewise({0.0: 0.0, 0.25: 0.11, 0.5: 0.5}), 100_000) == [0.0, 0.11, 0.5]


class Numbers(LightningModule):
    """Remember the rates of a recurrent layer, which takes numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, 2, dropout=0.3)
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rates.append(self.lstm.dropout)
        return self.lstm(batch)[0].square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(22, 3, 4), batch_size=1)


def test_only_compiled_modules_round_a_schedule() -> None:
    schedule = Linear(0.6, 0.0)
    exact = [0.6 * (1.0 - step / 21) for step in range(22)]
    plain, compiled = Numbers(), Numbers()
    compiled.lstm.compile(backend="eager")
    for model in (plain, compiled):
        Trainer(max_epochs=1, barebones=True, callbacks=[ScheduledDropout(schedule)]).fit(model)
        assert model.lstm.dropout == 0.3
    assert plain.rates == pytest.approx(exact)
    assert len(set(compiled.rates)) == LEVELS and (compiled.rates[0], compiled.rates[-1]) == (0.6, 0.0)
    assert all(abs(rounded - rate) <= 0.05 + 1e-9 for rounded, rate in zip(compiled.rates, exact, strict=True))


def test_an_uncompiled_run_draws_as_torch_does() -> None:
    torch.manual_seed(0)
    model = Net(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), DropPath(0.1)))
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(1)
    Trainer(max_epochs=1, barebones=True, callbacks=[ScheduledDropout(Linear(0.8, 0.1))]).fit(model)
    by_hand = Net(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), DropPath(0.1)))
    by_hand.load_state_dict(start)
    optimizer = by_hand.configure_optimizers()
    torch.manual_seed(1)
    torch.empty((), dtype=torch.int64).random_()  # the seed that a DataLoader draws
    for step in range(8):
        by_hand.net[1].p = by_hand.net[2].drop_prob = Linear(0.8, 0.1)(step, 8)  # type: ignore[index, union-attr]
        by_hand(torch.ones(4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(weight, by_hand.state_dict()[name]) for name, weight in model.state_dict().items())


# ---- the values are those of torch -----------------------------------------------------------------------------------

ELEMENTS = (2000, 30)
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Dropout": (nn.Dropout(), ELEMENTS),
    "Dropout1d": (nn.Dropout1d(), (200, 30, 4)),
    "Dropout1d without a batch": (nn.Dropout1d(), (6000, 4)),
    "Dropout2d": (nn.Dropout2d(), (200, 30, 2, 2)),
    "Dropout2d of three dimensions": (nn.Dropout2d(), (200, 30, 4)),
    "Dropout3d": (nn.Dropout3d(), (200, 30, 2, 2, 2)),
    "Dropout3d without a batch": (nn.Dropout3d(), (6000, 2, 2, 2)),
    "AlphaDropout": (nn.AlphaDropout(), ELEMENTS),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(), (200, 30, 2, 2)),
    "DropPath": (DropPath(), (6000, 3)),
    "timm's DropPath": (TimmDropPath(), (6000, 3)),
    "timm's DropPath without a scale": (TimmDropPath(scale_by_keep=False), (6000, 3)),
}


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_values_are_those_of_the_layer(name: str, rate: float) -> None:
    """The same two values in the same shapes, as often; no rate of 0 or 1 gives a NaN."""
    layer, size = LAYERS[name]
    setattr(layer, "p" if hasattr(layer, "p") else "drop_prob", rate)
    forward = forward_at(layer, rate_tensor(torch.device("cpu")).fill_(rate))
    assert forward is not None
    x = torch.ones(size)
    wanted, got = layer(x.clone()), forward(x.clone())
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert torch.allclose(got.unique(), wanted.unique(), atol=1e-6), (got.unique(), wanted.unique())
    assert got.mean().item() == pytest.approx(wanted.mean().item(), abs=0.06)
    same = [torch.equal(y.flatten(k)[..., 0], y.flatten(k).amin(-1)) for k in range(1, x.ndim) for y in (got, wanted)]
    assert same[::2] == same[1::2]  # the dimensions over which the mask is shared
    layer.eval()
    assert torch.equal(forward(x), x)
    layer.train()


def test_in_place_stays_in_place() -> None:
    x, rate = torch.ones(100), rate_tensor(torch.device("cpu")).fill_(0.5)
    forward = forward_at(nn.Dropout(inplace=True), rate)
    assert forward is not None and forward(x) is x and set(x.tolist()) == {0.0, 2.0}


def test_half_precision_has_its_own_dtype() -> None:
    x, rate = torch.ones(1000, dtype=torch.bfloat16), rate_tensor(torch.device("cpu")).fill_(0.5)
    for layer in (nn.Dropout(), nn.AlphaDropout()):
        forward = forward_at(layer, rate)
        assert forward is not None and forward(x).dtype == torch.bfloat16


def test_a_class_of_a_user_keeps_its_forward() -> None:
    class Own(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            return input

    assert forward_at(Own(), torch.zeros(())) is None
    assert forward_at(nn.MultiheadAttention(4, 2), torch.zeros(())) is None
