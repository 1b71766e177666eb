"""ActivationRegularization against the same term that the module adds to its loss, in every kind of training."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_optim import (
    L1,
    L2,
    ActivationRegularization,
    ElasticNet,
    Flooding,
    GradientAccumulation,
    Linear,
    ManualOptimizationMixin,
    Penalty,
    SharpnessAwareMixin,
    WeightRegularization,
)
from tests.lightning import LightningModule, MisconfigurationException, MixedPrecision, Trainer

BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).double() for seed in range(6)]
A, B = 0.1, 0.03  # strengths of L1 and L2

Callbacks = Callable[[], list[Any]]


class Net(LightningModule):
    """Module that adds the terms itself, if ``by_hand``: by hooks of its own on the same modules."""

    on: tuple[str, ...] = ("hidden",)

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(3, 5), nn.Linear(5, 2)
        self.by_hand = by_hand
        self.outputs: list[Tensor] = []
        self.strengths = (A, B)
        self.double()

    def configure_callbacks(self) -> list[Any]:
        for name in self.on if self.by_hand else ():
            self.get_submodule(name).register_forward_hook(lambda _, __, output: self.outputs.append(output))
        return []

    def predict(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x)))

    def loss_of(self, x: Tensor) -> Tensor:
        return mse_loss(self.predict(x), torch.ones(len(x), 2, dtype=x.dtype))

    def with_terms(self, loss: Tensor) -> Tensor:
        a, b = self.strengths
        outputs, self.outputs = self.outputs, []
        return loss + sum((a * y.abs().sum() + b * y.square().sum()) / len(y) for y in outputs)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.with_terms(self.loss_of(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)

    def train_dataloader(self) -> Any:
        return DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]


class Dictionary(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx)}


class Manual(Net):
    def __init__(self, by_hand: bool = False) -> None:
        super().__init__(by_hand)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Optimized(ManualOptimizationMixin, Net):
    def __init__(self, by_hand: bool = False) -> None:
        super().__init__(by_hand)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.optimize(super().training_step(batch, batch_idx))


class Sharp(SharpnessAwareMixin, Net):
    pass


class Checkpointed(Net):
    """Compute the hidden layer again in the backward pass; not by hand, where it would be in two terms."""

    reentrant = False

    def predict(self, x: Tensor) -> Tensor:
        def part(x: Tensor) -> Tensor:
            return torch.tanh(self.hidden(x))

        if self.by_hand:
            return self.out(part(x))
        return self.out(checkpoint(part, x.requires_grad_(), use_reentrant=self.reentrant))


class Reentrant(Checkpointed):
    reentrant = True


class Twice(Net):
    """Call a layer twice."""

    on = ("again",)

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__(by_hand)
        self.again = nn.Linear(5, 5).double()

    def predict(self, x: Tensor) -> Tensor:
        return self.out(self.again(torch.tanh(self.again(self.hidden(x)))))


class WithGradientPenalty(Net):
    """Compute a gradient of its own in ``training_step``, through the penalized module."""

    def loss_of(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        [slope] = torch.autograd.grad(self.predict(x).sum(), x, create_graph=True)
        return super().loss_of(x) + slope.square().sum()


class Frozen(Net):
    """Train a layer that is in evaluation mode, as a backbone with frozen statistics is."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.hidden.eval()


def fit(model: LightningModule, *callbacks: Any, epochs: int = 2, **arguments: Any) -> Trainer:
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    quiet["log_every_n_steps"] = 1  # type: ignore[assignment]
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **(quiet | arguments))
    trainer.fit(model)
    return trainer


def terms() -> list[Penalty]:
    return [L1(A), L2(B)]


def assert_as_by_hand(kind: type[Net], others: Callbacks = list, scale: bool = False, **more: Any) -> None:
    """Assert that a module has the same weights with the callback and with its own terms, and others without both."""
    models = [kind(), kind(by_hand=True), kind()]
    with_callback = [ActivationRegularization(terms(), on=list(kind.on))]
    for model, callbacks in zip(models, (with_callback, [], []), strict=True):
        fit(model, *callbacks, *others(), plugins=[scaled()] if scale else [], **more)
    ours, by_hand, without = (dict(model.named_parameters()) for model in models)
    for name, weight in by_hand.items():
        assert torch.allclose(ours[name], weight, rtol=1e-11, atol=1e-12), name
    assert not torch.allclose(without["hidden.weight"], by_hand["hidden.weight"], atol=1e-3)


def scaled() -> Any:
    """Return a precision with a loss scale, without the rounding of half precision."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    return plugin


@pytest.mark.parametrize(
    "kind",
    [Net, Dictionary, Manual, Optimized, Sharp, Checkpointed, Reentrant, Twice, WithGradientPenalty, Frozen],
    ids=lambda kind: kind.__name__,
)
def test_equals_the_term_in_the_loss(kind: type[Net]) -> None:
    assert_as_by_hand(kind)


@pytest.mark.parametrize("kind", [Net, Optimized, Checkpointed, Reentrant], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "others",
    [
        lambda: [GradientAccumulation(4)],  # the second window of an epoch has two micro-batches
        lambda: [GradientAccumulation(2, weight_by=lambda batch: batch[:, 0].abs().sum())],
        lambda: [GradientAccumulation({0: 1, 1: 3})],
    ],
    ids=["windows", "weighted", "by_epoch"],
)
@pytest.mark.parametrize("scale", [False, True], ids=["", "scaled"])
def test_equals_the_term_in_the_loss_of_windows(kind: type[Net], others: Callbacks, scale: bool) -> None:
    assert_as_by_hand(kind, others, scale)


def test_equals_the_term_in_the_loss_of_lightnings_windows() -> None:
    assert_as_by_hand(Net, accumulate_grad_batches=4)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_flooding_compares_the_loss_without_the_term_in_any_order(order: tuple[int, ...]) -> None:
    class Flooded(Net):
        def loss_of(self, x: Tensor) -> Tensor:
            loss = super().loss_of(x)
            return (loss - 1.2).abs() + 1.2 if self.by_hand else loss

    ours, by_hand = Flooded(), Flooded(by_hand=True)
    callbacks = [ActivationRegularization(terms(), on="hidden"), Flooding(1.2)]
    fit(ours, *(callbacks[place] for place in order))
    fit(by_hand)
    assert torch.allclose(ours.hidden.weight, by_hand.hidden.weight, rtol=1e-11, atol=1e-12)


def test_a_strength_follows_optimizer_steps() -> None:
    class Scheduled(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.strengths = (0.3 * (1 - self.trainer.global_step / 5), 0.0)
            return super().training_step(batch, batch_idx)

    ours, by_hand = Scheduled(), Scheduled(by_hand=True)
    fit(ours, ActivationRegularization(L1(Linear(0.3, 0.0)), on="hidden"), GradientAccumulation(2))
    fit(by_hand, GradientAccumulation(2))
    assert torch.allclose(ours.hidden.weight, by_hand.hidden.weight, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [Net, Sharp, Checkpointed, Reentrant, Manual], ids=lambda kind: kind.__name__)
def test_values_are_logged_once_each(kind: type[Net]) -> None:
    net, batch = Net(), BATCHES[0]
    output = net.hidden(batch).detach()
    callback = ActivationRegularization([L1(A), ElasticNet(0.0, B), L1(A)], on="hidden")
    trainer = fit(kind(), callback, epochs=1, limit_train_batches=1)
    logged = trainer.callback_metrics
    assert float(logged["regularization/activations/l1"]) == pytest.approx(A * float(output.abs().sum()) / 4, rel=1e-6)
    assert float(logged["regularization/activations/elasticnet"]) == pytest.approx(
        B * float(output.square().sum()) / 4, rel=1e-6
    )
    assert logged["regularization/activations/l1_2"] == logged["regularization/activations/l1"]


def test_two_callbacks_log_under_names_of_their_own() -> None:
    callbacks: list[Any] = []
    for name, strength in ((None, 3.0), ("second", 1.0)):
        callbacks.append(ActivationRegularization(L1(strength * A), on="hidden", name=name))
        callbacks.append(WeightRegularization(L2(strength), name=name))
    trainer = fit(Net(), *callbacks)
    logged = trainer.callback_metrics
    for name in ("activations/l1", "l2"):
        assert float(logged[f"regularization/{name}"]) > 2 * float(logged[f"regularization/{name}_2"])


def test_values_are_computed_at_logged_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    monkeypatch.setattr(L1, "_value", lambda self, weights: computed.append(1) or torch.zeros(()))
    fit(Net(), ActivationRegularization(L1(A), on="hidden"), epochs=1, log_every_n_steps=3)
    assert len(computed) == 2


# ---- outputs ---------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["one", "other"])


class Several(nn.Module):
    """Return two tensors in some structure, and things that are no tensors."""

    def __init__(self, build: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.build = nn.Linear(3, 6), build

    def forward(self, x: Tensor) -> Any:
        return self.build(*self.layer(x).chunk(2, dim=1))


STRUCTURES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda one, other: (one, other, None, 3),
    "list": lambda one, other: [one, other, "text"],
    "dictionary": lambda one, other: {"a": one, "b": {"c": other, "count": torch.ones(4, dtype=torch.int64)}},
    "repeated": lambda one, other: (one, [other, one]),
    "named": lambda one, other: Pair(one, (other, other.detach(), other.sum().detach())),
}


def step(layer: nn.Module, call: Callable[[nn.Module], Any], on: str = "layer") -> dict[str, Tensor]:
    """Return the gradients after one loss of a module that has this layer, penalized with L1."""

    class Layered(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 0.0 * call(self.layer).sum()  # the gradient is that of the penalty alone

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}

        def train_dataloader(self) -> Any:
            return DataLoader([0])  # type: ignore[arg-type]

    model = Layered()
    fit(model, ActivationRegularization(L1(A), on=on), epochs=1)
    return model.grads


def assert_gradients(found: dict[str, Tensor], layer: nn.Module, term: Tensor) -> None:
    named = dict(layer.named_parameters())
    slopes = torch.autograd.grad(A * term, list(named.values()))
    for name, slope in zip(named, slopes, strict=True):
        assert torch.allclose(found[name], slope, atol=1e-6), name


@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_tensor_of_a_structure_is_penalized(structure: str) -> None:
    torch.manual_seed(0)
    layer, x = Several(STRUCTURES[structure]), torch.randn(4, 3)
    kept = {name: weight.detach().clone() for name, weight in layer.named_parameters()}

    def call(layer: nn.Module) -> Tensor:
        output = layer(x)
        assert type(output) is type(STRUCTURES[structure](x, x))
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        return torch.stack([leaf.sum() for leaf in leaves if leaf.requires_grad]).sum()

    found = step(layer, call)
    for name, weight in layer.named_parameters():
        weight.data = kept[name]
    assert_gradients(found, layer, layer.layer(x).abs().sum() / 4)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.MultiheadAttention], ids=lambda kind: kind.__name__)
def test_the_batch_of_recurrent_and_attention_layers(kind: Any, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = kind(4, 2, batch_first=batch_first)
    x = torch.randn(3, 5, 4)
    kept = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
    arguments = (x, x, x) if kind is nn.MultiheadAttention else (x,)
    found = step(layer, lambda layer: layer(*arguments)[0])
    for name, weight in layer.named_parameters():
        weight.data = kept[name]
    assert_gradients(found, layer, layer(*arguments)[0].abs().sum() / (3 if batch_first else 5))


def test_packed_sequences() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(4, 2)
    packed = pack_padded_sequence(torch.randn(5, 3, 4), [5, 3, 2])
    kept = {name: weight.detach().clone() for name, weight in layer.named_parameters()}

    def call(layer: nn.Module) -> Tensor:
        output = layer(packed)[0]
        assert isinstance(output, PackedSequence)
        return pad_packed_sequence(output)[0]

    found = step(layer, call)
    for name, weight in layer.named_parameters():
        weight.data = kept[name]
    assert_gradients(found, layer, call(layer).abs().sum() / 3)


def test_complex_outputs() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2, dtype=torch.complex64), torch.randn(4, 3, dtype=torch.complex64)
    kept = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
    found = step(layer, lambda layer: layer(x).abs())
    for name, weight in layer.named_parameters():
        weight.data = kept[name]
    assert_gradients(found, layer, layer(x).abs().sum() / 4)


def test_half_precision_is_penalized_in_fp32() -> None:
    """A sum of fp16 overflows beyond 65504, and the values of these outputs are near 300."""
    layer, x = nn.Linear(3, 2), torch.full((4, 3), 100.0)
    with torch.no_grad():
        layer.weight.fill_(1.0)

    class Halved(Net):
        def __init__(self) -> None:
            super().__init__()
            self.float()
            self.hidden = layer

        def loss_of(self, x: Tensor) -> Tensor:
            return self.hidden(100.0 * torch.ones(4, 3)).float().mean() * 1e-3

    trainer = fit(
        Halved(),
        ActivationRegularization(L2(1.0), on="hidden"),
        epochs=1,
        precision="bf16-mixed",
        limit_train_batches=1,
    )
    value = float(trainer.callback_metrics["regularization/activations/l2"])
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
    assert value == pytest.approx(2 * float(x[0].sum()) ** 2, rel=0.02)


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["submodule", "in_place", "around", "whole"])
@pytest.mark.parametrize("before", [False, True], ids=["", "compiled_before"])
def test_compiled_modules(how: str, before: bool) -> None:
    class Compiled(Net):
        on = ("encoder.0", "encoder.1")

        def __init__(self, by_hand: bool = False) -> None:
            super().__init__(by_hand)
            self.encoder: Any = nn.Sequential(self.hidden, nn.Tanh())

        def predict(self, x: Tensor) -> Tensor:
            return self.out(self.encoder(x))

    ours, by_hand = Compiled(), Compiled(by_hand=True)
    torch._dynamo.reset()
    model: Any = ours
    if how == "submodule":
        ours.encoder[0] = torch.compile(ours.encoder[0], backend="aot_eager")
    elif how == "in_place":
        ours.encoder[0].compile(backend="aot_eager")
    elif how == "around":
        ours.encoder = torch.compile(ours.encoder, backend="aot_eager")
    else:
        model = torch.compile(ours, backend="aot_eager")
    if before:  # torch does not look for hooks that are new in compiled code
        weights = [weight.detach().clone() for weight in ours.parameters()]
        fit(model)
        with torch.no_grad():
            torch._foreach_copy_(list(ours.parameters()), weights)
    fit(model, ActivationRegularization(terms(), on=list(Compiled.on)))
    fit(by_hand)
    assert torch.allclose(ours.out.weight, by_hand.out.weight, rtol=1e-9, atol=1e-10)
    assert torch.allclose(ours.hidden.weight, by_hand.hidden.weight, rtol=1e-9, atol=1e-10)


# ---- what it refuses and tells ---------------------------------------------------------------------------------------


def test_a_layer_that_is_replaced_in_the_fit_is_penalized_from_the_next_epoch_on() -> None:
    class Replacing(Net):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 0:
                torch.manual_seed(7)
                new = nn.Linear(3, 5).double()
                if self.by_hand:
                    new.register_forward_hook(lambda _, __, output: self.outputs.append(output))
                self.hidden = new
                self.trainer.optimizers = [self.configure_optimizers()]

    ours, by_hand = Replacing(), Replacing(by_hand=True)
    fit(ours, ActivationRegularization(terms(), on="hidden"))
    fit(by_hand)
    assert torch.allclose(ours.hidden.weight, by_hand.hidden.weight, rtol=1e-11, atol=1e-12)


def test_nothing_is_left_after_the_fit() -> None:
    model = Net()
    keys = list(model.state_dict())
    fit(model, ActivationRegularization(L1(A), on="*"))
    assert not any(module._forward_hooks for module in model.modules())
    assert list(model.state_dict()) == keys


def test_an_output_that_is_changed_in_place_is_refused() -> None:
    class InPlace(Net):
        def predict(self, x: Tensor) -> Tensor:
            return self.out(torch.relu_(self.hidden(x)))

    with pytest.raises(MisconfigurationException, match=r"'hidden'.*in place.*inplace=False"):
        fit(InPlace(), ActivationRegularization(L1(A), on="hidden"))


def test_the_module_that_changes_its_input_in_place_may_be_penalized() -> None:
    class InPlace(Net):
        on = ("relu",)

        def __init__(self, by_hand: bool = False) -> None:
            super().__init__(by_hand)
            self.relu = nn.ReLU(inplace=True)

        def predict(self, x: Tensor) -> Tensor:
            return self.out(self.relu(self.hidden(x)))

    assert_as_by_hand(InPlace)


def test_an_output_without_tensors_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="'layer' returns str"):
        step(Several(lambda one, other: "text"), lambda layer: layer(torch.ones(4, 3)) and layer.layer.weight)


class Aside(Net):
    """Module with a layer whose output has no effect, and one that is never called."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__(by_hand)
        self.aside, self.unused = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def predict(self, x: Tensor) -> Tensor:
        self.aside(x)
        return super().predict(x)


@pytest.mark.parametrize(("on", "named"), [("*", "'aside' in"), ("unused", "'unused' in"), (["aside"], "'aside' in")])
def test_outputs_without_an_effect_are_told_once(on: Any, named: str) -> None:
    with pytest.warns(UserWarning, match="has penalized no output") as caught:
        fit(Aside(), ActivationRegularization(L1(A), on=on))
    told = [str(one.message) for one in caught if "has penalized" in str(one.message)]
    assert len(told) == 1 and named in told[0]


class Frozen(Net):
    """The first layer is frozen until an epoch."""

    def __init__(self, until: int) -> None:
        super().__init__()
        self.until = until

    def on_train_epoch_start(self) -> None:
        self.hidden.requires_grad_(self.current_epoch >= self.until)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return super().training_step(batch.detach(), batch_idx)  # other tests ask for the gradient of the batches


def test_weights_that_are_unfrozen_later_are_no_mistake() -> None:
    plain, penalized = Frozen(until=1), Frozen(until=1)
    fit(plain)
    fit(penalized, ActivationRegularization(L1(1.0), on="hidden"))
    assert not torch.equal(plain.hidden.weight, penalized.hidden.weight)


def test_outputs_that_stay_frozen_are_told_at_the_end() -> None:
    with pytest.warns(UserWarning, match="has penalized no output in this fit: the weights of 'hidden'"):
        fit(Frozen(until=9), ActivationRegularization(L1(A), on="hidden"))
    fit(Frozen(until=9), ActivationRegularization(L1(A), on=["hidden", "out"]))


def test_a_glob_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="`on='hiden'` matches no module of Net; did you mean 'hidden'"):
        fit(Net(), ActivationRegularization(L1(A), on="hiden"))


def test_lbfgs_is_refused() -> None:
    class Searching(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(MisconfigurationException, match="line search of LBFGS"):
        fit(Searching(), ActivationRegularization(L1(A), on="hidden"))
