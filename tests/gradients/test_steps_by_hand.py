"""Under manual optimization a step that `optimize` does not take is an error, and losses that move nothing are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import GradientAccumulation, GradientClipping, ManualOptimizationMixin, TargetBatchSize
from tests.lightning import LightningModule, MisconfigurationException, MixedPrecision, Trainer

Train = Callable[["GAN", Tensor, Any, Any], None]


class GAN(ManualOptimizationMixin, LightningModule):
    """Two nets, two optimizers, and a training step that each test gives."""

    def __init__(self, train: Train) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.g, self.d = nn.Linear(2, 2), nn.Linear(2, 1)
        self.train_on = train

    def generated(self, batch: Tensor) -> Tensor:
        return self.d(self.g(batch)).mean()

    def told(self, batch: Tensor) -> Tensor:
        return self.d(self.g(batch).detach()).mean() - self.d(batch).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.train_on(self, batch, *self.optimizers())

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return torch.utils.data.DataLoader(torch.randn(24, 2, generator=generator), batch_size=4)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.g.parameters(), lr=0.1), torch.optim.Adam(self.d.parameters(), lr=0.1)]


def fit(module: GAN, *callbacks: Any, **options: Any) -> GAN:
    options = {"max_epochs": 1, "barebones": True} | options
    trainer = Trainer(callbacks=list(callbacks), accelerator="cpu", **options)
    trainer.fit(module)
    return module


def weights(module: GAN) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


# ---- steps that `optimize` does not take -----------------------------------------------------------------------------


def by_hand(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
    for loss, optimizer in ((module.generated, og), (module.told, od)):
        module.manual_backward(loss(batch))
        optimizer.step()
        optimizer.zero_grad()


def of_torch(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
    module.manual_backward(module.generated(batch))
    og.optimizer.step()


def left_over(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
    module.optimize(module.generated(batch), og)
    og.step()


def within_another(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
    og.optimizer.register_step_post_hook(lambda *_: od.step())
    module.optimize(module.generated(batch), og)


@pytest.mark.parametrize("n", [4, {0: 1, 3: 4}, TargetBatchSize(16)], ids=str)
@pytest.mark.parametrize("train", [by_hand, of_torch])
def test_the_first_step_by_hand_is_an_error_and_moves_nothing(train: Train, n: Any) -> None:
    _assert_refused(train, n)


def test_a_step_that_is_left_over_is_an_error_and_moves_nothing() -> None:
    _assert_refused(left_over, 4)


def _assert_refused(train: Train, n: Any) -> None:
    module = GAN(train)
    before = weights(module)
    with pytest.raises(
        MisconfigurationException, match=r"accumulates 4 .* GAN calls `step` of optimizer 0 \(SGD\)"
    ) as caught:
        fit(module, GradientAccumulation(n))
    assert "with `self.optimize(loss, optimizer)` alone" in str(caught.value)
    assert all(map(torch.equal, before, weights(module)))


@pytest.mark.parametrize("train", [by_hand, of_torch, left_over])
def test_a_step_by_hand_with_a_scaler(train: Train) -> None:
    module = GAN(train)
    before = weights(module)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    with pytest.raises(MisconfigurationException, match="alone"):
        fit(module, GradientAccumulation(4), plugins=[plugin])
    assert all(map(torch.equal, before, weights(module)))


def test_a_step_of_another_optimizer_within_that_of_optimize() -> None:
    module = GAN(within_another)
    with pytest.raises(MisconfigurationException, match=r"step` of optimizer 1 \(Adam\)"):
        fit(module, GradientAccumulation(2))


def test_the_optimizers_are_free_again_after_the_fit() -> None:
    module = GAN(by_hand)
    with pytest.raises(MisconfigurationException):
        fit(module, GradientAccumulation(4))
    fit(module)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("callbacks", [[], [GradientClipping(1.0)], [GradientAccumulation(1)]], ids=str)
def test_without_accumulation_a_step_by_hand_is_a_step(callbacks: Any) -> None:
    module = GAN(by_hand)
    before = weights(module)
    fit(module, *callbacks)
    assert not any(map(torch.equal, before, weights(module)))


def test_a_zero_grad_by_hand_in_an_open_window_is_an_error() -> None:
    def train(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
        og.zero_grad()
        module.optimize(module.generated(batch), og)

    with pytest.raises(MisconfigurationException, match=r"After 1 of 4 .* optimizer 0 \(SGD\) are gone: .*`zero_grad`"):
        fit(GAN(train), GradientAccumulation(4))
    fit(GAN(train))


# ---- losses ----------------------------------------------------------------------------------------------------------


def right(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
    module.optimize(module.generated(batch), og)
    module.optimize(module.told(batch), od)


@pytest.mark.parametrize("callbacks", [[], [GradientAccumulation(4)], [GradientClipping(1.0)]], ids=str)
def test_losses_that_reach_no_weight_of_the_optimizer_are_told_once(callbacks: Any) -> None:
    def train(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
        module.optimize(module.told(batch), od)
        module.optimize(module.told(batch), og)

    fit(GAN(right), *callbacks)
    with pytest.warns(UserWarning, match=r"^optimizer 0 \(SGD\) has had no gradient in any of its [26] steps") as told:
        fit(GAN(train), *callbacks, max_epochs=3)
    assert len([warning for warning in told if "has had no gradient" in str(warning.message)]) == 1
    quiet = {"barebones": False, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    for options in ({"fast_dev_run": 2} | quiet, {"max_steps": 2}):  # the epoch does not end
        fit(GAN(train), *callbacks, **options)


def test_an_optimizer_without_a_step_in_the_last_batch_is_told_in_the_next_epoch() -> None:
    def train(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
        calls.append(0)
        if len(calls) % 2:
            module.optimize(module.told(batch), og)

    calls: list[int] = []
    with pytest.warns(UserWarning, match=r"^optimizer 0 \(SGD\) has had no gradient in any of its 4 steps"):
        fit(GAN(train), max_epochs=2)


@pytest.mark.parametrize("n", [1, 2])
def test_the_first_losses_may_reach_nothing(n: int) -> None:
    """Training in stages: the weights of an optimizer are used from a later batch on."""
    calls: list[int] = []

    def train(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
        calls.append(0)
        module.optimize(module.generated(batch) if len(calls) > 3 else module.told(batch), og)

    module = GAN(train)
    before = weights(module)
    fit(module, GradientAccumulation(n))
    assert len(calls) == 6 and not torch.equal(before[0], module.g.weight)


@pytest.mark.parametrize("n", [1, 2])
def test_a_later_loss_may_reach_nothing(n: int) -> None:
    """Batches of two kinds: some have nothing for an optimizer."""
    calls: list[int] = []

    def train(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
        calls.append(len(calls))
        module.optimize(module.told(batch) if len(calls) % 2 == 0 else module.generated(batch), og)

    module = GAN(train)
    before = weights(module)
    fit(module, GradientAccumulation(n))
    assert len(calls) == 6 and not torch.equal(before[0], module.g.weight)


def test_a_scaler_that_takes_no_step_without_a_gradient_is_told() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    module = GAN(lambda module, batch, og, od: module.optimize(module.told(batch), og))
    with pytest.raises(MisconfigurationException, match=r"optimizer 0 \(SGD\) has no gradient in this step, .*Scaler"):
        fit(module, plugins=[plugin])


def test_an_optimizer_whose_weights_are_frozen_is_none_of_our_business() -> None:
    module = GAN(lambda module, batch, og, od: module.optimize(module.generated(batch), og))
    module.g.requires_grad_(False)
    fit(module)


def test_a_loss_that_is_no_scalar_or_has_no_gradient() -> None:
    def vector(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
        module.optimize(module.d(module.g(batch)), og)

    def detached(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
        module.optimize(module.generated(batch).detach(), og)

    def one_element(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
        module.optimize(module.generated(batch).reshape(1, 1), og)

    with pytest.raises(ValueError, match=r"a scalar, got a tensor of shape \(4, 1\): pass its mean, `loss.mean\(\)`"):
        fit(GAN(vector))
    with pytest.raises(ValueError, match="has no gradient: it was detached"):
        fit(GAN(detached))
    fit(GAN(one_element), GradientAccumulation(2))


# ---- what is passed for an optimizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda og, od: 1, r"got 1; write `self.optimizers\(\)\[1\]`"),
        (lambda og, od: 7, r"got 7; write `self.optimizers\(\)\[0\]`"),
        (lambda og, od: [og, od], "got a list of them; call it once for each"),
        (lambda og, od: "generator", "got str$"),
        (lambda og, od: True, "got bool$"),
        (lambda og, od: torch.optim.SGD(nn.Linear(1, 1).parameters()), "got another SGD$"),
    ],
)
def test_what_is_no_optimizer_of_the_module_is_told(given: Any, told: str) -> None:
    def train(module: GAN, batch: Tensor, og: Any, od: Any) -> None:
        module.optimize(module.generated(batch), given(og, od))

    with pytest.raises(ValueError, match=rf"which are 0 \(SGD\), 1 \(Adam\); {told}"):
        fit(GAN(train))


def test_an_index_beside_one_optimizer() -> None:
    class One(GAN):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.optimize(self.generated(batch), 0)  # type: ignore[arg-type]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"which are 0 \(SGD\); got 0; write `self.optimizers\(\)`, or leave it out$"):
        fit(One(right))
