"""WeightDrop: masks on weights of one forward pass, raw weights in the state dict, recurrent layers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_optim import Linear, ScheduledDropout, WeightDrop
from lightning_optim.regularization.dropout import weight_drop
from lightning_optim.regularization.dropout.weight_drop import weights_of
from tests.lightning import Trainer
from tests.regularization.test_compiled_dropout import Backend, Net

LAYERS: dict[str, tuple[nn.Module, Tensor, list[str]]] = {
    "Linear": (nn.Linear(3, 5), torch.randn(2, 3), ["weight"]),
    "Conv2d": (nn.Conv2d(2, 3, 2), torch.randn(2, 2, 4, 4), ["weight"]),
    "LSTM": (nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(5, 2, 3), ["weight_hh_l0", "weight_hh_l0_reverse"]),
    "GRU": (nn.GRU(3, 4, bias=False), torch.randn(5, 2, 3), ["weight_hh_l0"]),
    "RNN": (nn.RNN(3, 4), torch.randn(5, 2, 3), ["weight_hh_l0"]),
    "LSTMCell": (nn.LSTMCell(3, 4), torch.randn(2, 3), ["weight_hh"]),
}


def first(output: Any) -> Tensor:
    while isinstance(output, tuple):
        output = output[0]
    return output


def fixed(shape: torch.Size, rate: float = 0.5) -> Tensor:
    """Return factors that drop every third weight."""
    return (torch.arange(shape.numel()) % 3 != 0).float().reshape(shape) / (1.0 - rate)


@pytest.fixture
def fixed_masks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    drawn: list[torch.Size] = []

    def mask(like: Tensor, rate: float) -> Tensor:
        drawn.append(like.shape)
        return fixed(like.shape, rate)

    monkeypatch.setattr(weight_drop, "mask", mask)
    return drawn


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_weights_dropped_by_hand(name: str, fixed_masks: list[Any]) -> None:
    layer, x, names = LAYERS[name]
    names = [n for n in dict(layer.named_parameters()) if n.startswith("weight_hh")] or names
    by_hand = copy.deepcopy(layer)
    with torch.no_grad():
        for one in names:
            by_hand.get_parameter(one).mul_(fixed(layer.get_parameter(one).shape))
    dropping = WeightDrop(layer, 0.5)
    got, wanted = first(dropping(x)), first(by_hand(x))
    assert torch.equal(got, wanted) and len(fixed_masks) == len(names)
    got.square().sum().backward()
    wanted.square().sum().backward()
    for key, parameter in by_hand.named_parameters():
        factors = fixed(parameter.shape) if key in names else 1.0
        torch.testing.assert_close(layer.get_parameter(key).grad, parameter.grad * factors)
    layer.zero_grad()
    assert torch.equal(first(dropping.eval()(x)), first(layer(x)))


@pytest.mark.parametrize("name", LAYERS)
def test_raw_weights_are_in_the_state_dict_and_in_copies(name: str) -> None:
    layer, x, _ = LAYERS[name]
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    dropping = WeightDrop(layer, 0.9)
    dropping(x)
    assert dropping.state_dict().keys() == {f"module.{key}" for key in before}
    for state in (layer.state_dict(), copy.deepcopy(dropping).module.state_dict()):
        assert all(torch.equal(state[key], before[key]) for key in before)
    torch.save(dropping, io.BytesIO())
    assert all(isinstance(parameter, nn.Parameter) for parameter in layer.parameters())
    assert torch.equal(first(layer(x)), first(dropping.eval()(x)))


@pytest.mark.parametrize("name", ["Linear", "LSTM"])
def test_raw_weights_are_back_after_an_exception(name: str) -> None:
    layer, x, _ = LAYERS[name]
    wanted = first(layer(x))
    with pytest.raises(RuntimeError):
        WeightDrop(layer, 0.9)(torch.ones(2, 2, 9))
    assert torch.equal(first(layer(x)), wanted)


def test_one_mask_for_all_time_steps_of_a_pass_and_a_new_one_for_the_next() -> None:
    layer, x, h = WeightDrop(nn.RNN(2, 8, bias=False), 0.5), torch.zeros(2, 1, 2), torch.ones(1, 1, 8)
    torch.manual_seed(1)
    one, other = layer(x, h)[0], layer(x, h)[0]
    torch.manual_seed(1)
    second = layer(x[:1], one[:1])[0]  # the second step alone, with the mask of the first pass
    assert torch.allclose(one[1], second[0]) and not torch.equal(one[0], other[0])


def test_rates_of_zero_and_one() -> None:
    layer = nn.Linear(3, 5)
    x = torch.randn(2, 3)
    assert torch.equal(WeightDrop(layer, 0.0)(x), layer(x))
    assert torch.equal(WeightDrop(layer, 1.0)(x), layer.bias.expand(2, 5))


def test_weights_that_parameters_take_the_place_of() -> None:
    """A recurrent layer keeps a list of its weights: new parameters are dropped too."""
    layer = nn.GRU(2, 2)
    dropping = WeightDrop(layer, 1.0)
    layer.weight_hh_l0 = nn.Parameter(torch.full((6, 2), 100.0))
    x, h = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    without = copy.deepcopy(layer)
    with torch.no_grad():
        without.weight_hh_l0.zero_()
    assert torch.equal(dropping(x, h)[0], without(x, h)[0])


@pytest.mark.parametrize("wrong", [nn.ReLU(), nn.Sequential(nn.Linear(2, 2)), nn.LazyLinear(2), 0.5])
def test_modules_without_weights_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="`module` must be a layer that has weights of its own"):
        WeightDrop(wrong)


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_recurrent_layer_in_a_compiled_module() -> None:
    torch._dynamo.reset()

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = WeightDrop(nn.LSTM(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x + 0.0)[0] * 2.0

    graphs = []
    for rate in (0.3, Linear(0.8, 0.1)):
        torch._dynamo.reset()
        backend = Backend()
        model = Net(Recurrent(), (3, 2, 4))
        model.net.compile(backend=backend)
        Trainer(max_epochs=1, barebones=True, callbacks=[ScheduledDropout({"*drop": rate})]).fit(model)
        graphs.append(backend.graphs)
    assert graphs[1] <= graphs[0]
    torch._dynamo.reset()


# ---- inserted --------------------------------------------------------------------------------------------------------


class Language(Net):
    def __init__(self) -> None:
        super().__init__(nn.LSTM(4, 4, 2, dropout=0.25), (3, 2, 4))
        self.head = nn.Linear(4, 4)
        self.seen: list[Tensor] = []
        self.fail_at = -1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("broken")
        self.seen.append(self.head(torch.eye(4)) - self.head.bias)
        return self.head(self.net(batch)[0]).square().mean()


def test_inserted_on_weights() -> None:
    class Records(ScheduledDropout):
        drawn: list[tuple[str, torch.Size, float]] = []  # noqa: RUF012

        def draw(self, name: str, like: Tensor, rate: Any) -> Tensor:
            self.drawn.append((name, like.shape, rate))
            return super().draw(name, like, rate)

    model, callback = Language(), Records({"*": 0.5}, insert="weight")
    keys = list(model.state_dict())
    Trainer(max_epochs=1, barebones=True, callbacks=[callback]).fit(model)
    assert callback.rates_by_module() == {"net": 0.5, "head": 0.5}  # the last layer too: its outputs are not dropped
    in_a_step = [("head.weight", (4, 4), 0.5), ("net.weight_hh_l0", (16, 4), 0.5), ("net.weight_hh_l1", (16, 4), 0.5)]
    assert callback.drawn[:4] == [*in_a_step, in_a_step[0]] and len(callback.drawn) == 8 * 4
    assert any((weights == 0).any() for weights in model.seen)
    assert model.net.dropout == 0.25 and list(model.state_dict()) == keys
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", ["pruned", "weight_norm"])
def test_what_a_hook_computes_is_dropped_and_not_its_source(kind: str) -> None:
    model = Language()
    names = ("weight", "weight_hh_l0") if kind == "pruned" else ("weight",)
    for module, name in zip((model.head, model.net), names, strict=False):
        if kind == "pruned":
            prune.l1_unstructured(module, name, amount=0.25)
        else:
            torch.nn.utils.weight_norm(module, name)

    class Halves(ScheduledDropout):
        def draw(self, name: str, like: Tensor, rate: Any) -> Tensor:
            drawn.append(name)
            return fixed(like.shape)

    drawn: list[str] = []
    wanted = model.head.weight.detach().T * fixed(model.head.weight.shape).T
    Trainer(max_steps=1, barebones=True, callbacks=[Halves(0.5, insert="weight")]).fit(model)
    assert set(drawn) == {"head.weight", "net.weight_hh_l0", "net.weight_hh_l1"}
    torch.testing.assert_close(model.seen[0].detach(), wanted)


def test_what_a_parametrization_computes_is_left_out() -> None:
    model = Language()
    torch.nn.utils.parametrizations.weight_norm(model.net, "weight_hh_l0")
    torch.nn.utils.parametrizations.weight_norm(model.net, "weight_hh_l1")
    callback = ScheduledDropout(0.5, insert="weight")
    Trainer(max_steps=1, barebones=True, callbacks=[callback]).fit(model)
    assert callback.rates_by_module() == {"head": 0.5}
    with pytest.raises(ValueError, match="what a parametrization computes is not dropped"):
        Trainer(max_steps=1, barebones=True, callbacks=[ScheduledDropout({"net": 0.5}, insert="weight")]).fit(model)


def test_inserted_weights_are_undone_after_an_exception() -> None:
    model = Language()
    model.fail_at = 2
    with pytest.raises(RuntimeError, match="broken"):
        Trainer(max_epochs=1, barebones=True, callbacks=[ScheduledDropout(0.9, insert="weight")]).fit(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model.head(torch.eye(4)), model.head.weight.T + model.head.bias)


def test_a_copy_in_the_middle_of_a_fit_drops_nothing() -> None:
    class Copies(Language):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            for part in (copy.deepcopy(self.head), pickle.loads(pickle.dumps(self.head))):
                assert torch.equal(part(torch.eye(4)), part.weight.T + part.bias)
                part.weight = nn.Parameter(torch.zeros(4, 4))
                assert torch.equal(part(torch.eye(4)), part.bias.expand(4, 4)), "it calls another layer"
            return super().training_step(batch, batch_idx)

    callback = ScheduledDropout(0.9, insert="weight")
    Trainer(max_steps=1, barebones=True, callbacks=[callback]).fit(Copies())


def test_a_lazy_layer_gets_its_weights_first() -> None:
    model = Net(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)))
    callback = ScheduledDropout(1.0, insert="weight")
    Trainer(max_steps=1, barebones=True, callbacks=[callback]).fit(model)
    assert callback.rates_by_module() == {"net.0": 1.0, "net.1": 1.0}


def test_a_wrapped_layer_is_dropped_once() -> None:
    model = Net(nn.Sequential(WeightDrop(nn.Linear(4, 4)), nn.Linear(4, 4)))
    callback = ScheduledDropout({"net.0*": 0.3}, insert="weight")
    Trainer(max_steps=1, barebones=True, callbacks=[callback]).fit(model)
    assert callback.rates_by_module() == {"net.0": 0.3}


def test_weights_that_are_dropped() -> None:
    assert list(weights_of(nn.LSTM(2, 2, proj_size=1))) == ["weight_hh_l0"]
    assert list(weights_of(nn.LayerNorm(2))) == []
