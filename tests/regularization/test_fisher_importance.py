"""The importance of weights: the mean of squared gradients over samples, and what it protects in continual learning."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import L2SP, WeightRegularization, fisher_importance
from tests.lightning import LightningModule, Trainer


class Net(LightningModule):
    """Classifier with BatchNorm, dropout, a metric and a counter, which logs."""

    def __init__(self, features: int = 4, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes)
        )
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.accuracy = torchmetrics.MeanMetric()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.calls += 1
        logits = self(x)
        self.accuracy((logits.argmax(1) == y).float())
        self.log("accuracy", self.accuracy)
        self.log_dict({"loss": cross_entropy(logits, y)})
        return {"loss": cross_entropy(logits, y)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(count: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def by_hand(module: Net, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the mean of the squared gradients of one sample after another."""
    twin = copy.deepcopy(module).eval()
    sums = {name: torch.zeros_like(weight) for name, weight in twin.named_parameters() if weight.requires_grad}
    for one, target in zip(x, y, strict=True):
        twin.zero_grad()
        cross_entropy(twin(one[None]), target[None]).backward()
        for name, weight in twin.named_parameters():
            if weight.grad is not None:
                sums[name] += weight.grad**2 / len(x)
    return sums


def test_is_the_mean_of_squared_gradients_of_samples() -> None:
    torch.manual_seed(0)
    module, (x, y) = Net(), data()
    wanted = by_hand(module, x, y)
    for batches in ([(x, y)], [[x[:7], y[:7]], [x[7:], y[7:]]], DataLoader(TensorDataset(x, y), batch_size=3)):
        found = fisher_importance(module, batches)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)
    assert not found["unused"].any()
    assert found["net.0.weight"].any()


def test_the_module_is_as_before() -> None:
    module, (x, y) = Net(), data()
    module(x).sum().backward()
    module.net[1].eval()
    module.accuracy.update(0.5)
    state, grad = copy.deepcopy(module.state_dict()), module.net[0].weight.grad
    assert grad is not None
    kept, modes, random = grad.clone(), [part.training for part in module.modules()], torch.get_rng_state()
    fisher_importance(module, DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True))
    assert module.net[0].weight.grad is grad
    assert torch.equal(grad, kept)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert module.accuracy.compute() == 0.5
    assert (module.calls, "log" in vars(module)) == (0, False)


def test_after_an_error_the_module_is_as_before() -> None:
    module, (x, y) = Net(), data()
    with pytest.raises(RuntimeError):
        fisher_importance(module, [(x, y), (x[:, :2], y)])
    assert module.training
    assert "log" not in vars(module)


def test_of_a_module_that_a_trainer_has_trained() -> None:
    module, (x, y) = Net(), data()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_epochs=1, log_every_n_steps=1, **quiet).fit(module, DataLoader(TensorDataset(x, y), batch_size=5))
    wanted = by_hand(module, x, y)
    with torch.no_grad():  # gradients are computed all the same
        found = fisher_importance(module, [(x, y)])
    torch.testing.assert_close(found["net.3.weight"], wanted["net.3.weight"], rtol=1e-4, atol=1e-9)


def test_samples_are_the_first_ones() -> None:
    module, (x, y) = Net(), data()
    wanted = fisher_importance(module, [(x[:4], y[:4])])
    found = fisher_importance(module, [(x[:3], y[:3]), (x[3:], y[3:])], samples=4)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_compiled_module_has_the_same_names() -> None:
    module, (x, y) = Net(), data()
    wanted = fisher_importance(module, [(x, y)])
    found = fisher_importance(torch.compile(module), [(x, y)])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "batch",
    [
        {"x": data()[0], "more": [data()[1], "text", 3, None]},
        Pair(data()[0], data()[1]),
        (data()[0], {"names": [str(place) for place in range(10)], "weight": torch.tensor(2.0)}),
    ],
    ids=["dictionary", "named tuple", "texts"],
)
def test_batches_are_split_as_they_are_built(batch: Any) -> None:
    seen = []

    def loss(module: Net, sample: Any) -> Tensor:
        seen.append(sample)
        x = sample["x"] if isinstance(sample, dict) else sample[0]
        return module(x).square().sum()

    fisher_importance(Net(), [batch], loss)
    assert len(seen) == 10
    fourth = seen[4]
    x = fourth["x"] if isinstance(fourth, dict) else fourth[0]
    assert torch.equal(x, data()[0][4:5])
    assert type(fourth) is type(batch)
    if isinstance(fourth, dict):
        assert fourth["more"][1:] == ["text", 3, None]
        assert torch.equal(fourth["more"][0], data()[1][4:5])
    elif not isinstance(fourth, Pair):
        assert fourth[1] == {"names": ["4"], "weight": torch.tensor(2.0)}


def test_complex_and_half_precision_weights_have_real_factors_in_fp32() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor([1.0 + 2.0j]))
            self.b = nn.Parameter(torch.tensor([3.0], dtype=torch.bfloat16))

    module = Two()
    found = fisher_importance(module, [torch.ones(2, 1)], lambda m, x: (x * m.a).abs().square().sum() + m.b.sum())
    assert found["a"].tolist() == pytest.approx([20.0])  # the gradient is 2 w
    assert found["b"].tolist() == [1.0]
    assert found["b"].dtype == torch.float32


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Thing:
    """What cannot be split."""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((Net(), [data()], None, 0), "`samples` must be an integer >= 1, got 0"),
        ((Net(), []), "`batches` is empty"),
        ((ByHand(), [data()]), "optimizes by itself, and would move the weights: pass `loss`"),
        ((nn.Linear(4, 3), [data()]), "Linear is no LightningModule: pass `loss`"),
        ((Net(), [data()], lambda module, batch: module(batch[0])), r"must be a scalar tensor .* got shape \(1, 3\)"),
        ((Net(), [data()], lambda module, batch: None), "must be a scalar tensor .* got NoneType"),
        ((Net(), [data()], lambda module, batch: torch.zeros(())), "depends on trainable weights"),
        ((Net(), [(data()[0], data()[1][:3])]), r"got a tensor of shape \(3,\): let the loader make batches of one"),
        ((Net(), [(data()[0], Thing())]), "got Thing: let the loader make batches of one sample"),
        ((Net(), ["text"]), "got str: let the loader"),
    ],
)
def test_refused(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fisher_importance(*arguments)


# ---- continual learning ----------------------------------------------------------------------------------------------


class Digits(LightningModule):
    """Network that tells five digits apart: 0 to 4 first, and 5 to 9 then."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @torch.no_grad()
    def right(self, x: Tensor, y: Tensor) -> float:
        return (self.net(x).argmax(1) == y).float().mean().item()


@pytest.mark.parametrize("seed", [0, 1])
def test_what_was_learned_first_is_kept(seed: int) -> None:
    """Without a penalty half of the first task is forgotten; with EWC little of it, and the second one is learned."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, training = (images / 16).float(), torch.arange(len(images)) % 4 != 0

    def task(number: int, part: Tensor) -> TensorDataset:
        chosen = part & (labels // 5 == number)
        return TensorDataset(images[chosen], labels[chosen] % 5)

    def fit(module: Digits, number: int, terms: list[L2SP]) -> None:
        loader = DataLoader(task(number, training), batch_size=32, shuffle=True)
        callbacks = [WeightRegularization(term) for term in terms]
        Trainer(max_epochs=8, barebones=True, callbacks=callbacks).fit(module, loader)

    torch.manual_seed(seed)
    module = Digits()
    fit(module, 0, [])
    first, second = task(0, ~training).tensors, task(1, ~training).tensors
    learned = module.right(*first)
    assert learned > 0.95
    importance = fisher_importance(module, DataLoader(task(0, training), batch_size=32))
    forgetful = copy.deepcopy(module)
    fit(forgetful, 1, [])
    fit(module, 1, [L2SP(100.0, importance=importance, on="*")])
    assert forgetful.right(*first) < 0.6
    assert module.right(*first) > 0.75
    assert module.right(*second) > 0.85
