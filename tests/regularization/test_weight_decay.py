"""WeightDecay: equal to AdamW and to SGD with a decay, cautious or not, in a fit that skips and drops steps."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import (
    Linear,
    OptimCallback,
    ProximalL1,
    WeightDecay,
    WeightRegularization,
    drop_step,
)
from tests.lightning import BoringModel, Trainer

LR = 0.01


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Make small parameters, a large one, a transposed one and one in channels-last order."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (7,), (), (600, 500), (2, 3, 4, 5)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    made.append(torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype).t())
    made.append(torch.randn(2, 3, 4, 5, generator=generator).to(dtype).to(memory_format=torch.channels_last))
    return [nn.Parameter(tensor) for tensor in made]


def grads_(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_with_it_is_adamw(dtype: torch.dtype) -> None:
    ours, torchs = weights(dtype), weights(dtype)
    adam = torch.optim.Adam(ours, lr=LR)
    adamw = torch.optim.AdamW(torchs, lr=LR, weight_decay=0.3)
    decay = WeightDecay(0.3, on="*")
    for step in range(5):
        grads_(ours, step)
        grads_(torchs, step)
        decay.before_step_(ours, lr=LR)
        adam.step()
        decay.after_step_()
        adamw.step()
    for one, other in zip(ours, torchs, strict=True):
        assert torch.equal(one, other)


def test_sgd_with_it_is_sgd_with_a_decay_without_momentum() -> None:
    ours, torchs = weights(torch.float64), weights(torch.float64)
    plain, decayed = torch.optim.SGD(ours, lr=LR), torch.optim.SGD(torchs, lr=LR, weight_decay=0.3)
    decay = WeightDecay(0.3)
    for step in range(5):
        grads_(ours, step)
        grads_(torchs, step)
        decay.before_step_(ours, lr=LR)
        plain.step()
        decayed.step()
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weak_decay_is_not_lost_in_half_precision(dtype: torch.dtype) -> None:
    weight, single = torch.full((4, 4), 1.0 + 2**-7, dtype=dtype), torch.ones(2, 2)
    WeightDecay(0.0025, follows_lr=False).before_step_([weight, single], lr=0.1)
    torch.testing.assert_close(weight, (torch.full((4, 4), 1.0 + 2**-7) * 0.9975).to(dtype), rtol=0.0, atol=0.0)
    torch.testing.assert_close(single, torch.full((2, 2), 0.9975))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_cautious_decay_is_its_formula(optimizer: Any, dtype: torch.dtype) -> None:
    if optimizer is torch.optim.Adam and dtype is torch.float16:
        optimizer = partial(optimizer, eps=1e-3)  # 1e-8 is zero in fp16
    ours, plain = weights(dtype), weights(dtype)
    one, other = optimizer(ours, lr=LR), optimizer(plain, lr=LR)
    decay = WeightDecay(2.0, cautious=True)
    for step in range(4):
        grads_(ours, step)
        grads_(plain, step)
        decay.before_step_(ours, lr=LR)
        one.step()
        decay.after_step_()
        old = [weight.detach().clone() for weight in plain]
        other.step()
        with torch.no_grad():
            for weight, before in zip(plain, old, strict=True):
                move = before.double() - weight.double()
                agrees = (move * before.double() >= 0.0).to(dtype)
                weight.sub_(before * agrees, alpha=LR * 2.0)
        for now, wanted in zip(ours, plain, strict=True):
            torch.testing.assert_close(now, wanted)
            now.data.copy_(wanted)  # or a rounding could turn a sign in a later step


def test_cautious_decay_acts_where_the_optimizer_did_not_move() -> None:
    weight = torch.tensor([1.0, -1.0, 2.0, -2.0])
    decay = WeightDecay(0.5, cautious=True, follows_lr=False)
    decay.before_step_([weight], lr=0.1)
    weight += torch.tensor([0.0, 0.0, 0.5, 0.5])  # the third moves away from zero, the last towards it
    decay.after_step_()
    assert weight.tolist() == [0.5, -0.5, 2.5, -0.5]


def test_cautious_decay_of_complex_weights_takes_each_part_by_itself() -> None:
    weight = torch.tensor([1.0 - 1.0j, 2.0 + 0.0j])
    decay = WeightDecay(0.5, cautious=True, follows_lr=False)
    decay.before_step_([weight], lr=0.1)
    weight += torch.tensor([1.0 + 0.5j, -1.0 + 0.0j])
    decay.after_step_()
    assert weight.tolist() == [2.0 + 0.0j, 0.0 + 0.0j]


@pytest.mark.parametrize(
    ("follows_lr", "max_lr", "factor"),
    [(True, 0.4, 0.05), (False, 0.4, 0.5), ("schedule", 0.4, 0.0125), ("schedule", None, 0.05)],
)
def test_the_factor(follows_lr: Any, max_lr: float | None, factor: float) -> None:
    weight = torch.ones(2, dtype=torch.float64)
    WeightDecay(0.5, follows_lr=follows_lr).before_step_([weight], lr=0.1, max_lr=max_lr)
    torch.testing.assert_close(weight, torch.full_like(weight, 1.0 - factor))


def test_a_schedule_of_the_strength() -> None:
    decay, seen = WeightDecay(Linear(0.0, 1.0), follows_lr=False), []
    for step in range(3):
        weight = torch.ones(1)
        decay.before_step_([weight], lr=0.1, step=step, total=3)
        seen.append(weight.item())
    assert seen == [1.0, 0.5, 0.0]


def test_copies_are_made_once() -> None:
    parameters = weights()
    decay = WeightDecay(0.1, cautious=True)
    held = []
    for _ in range(3):
        decay.before_step_(parameters[:2], lr=LR)  # two groups
        decay.before_step_(parameters[2:], lr=LR)
        decay.after_step_()
        held.append([copy.data_ptr() for copy in decay._copies])
    assert held[0] == held[1] == held[2]
    assert sum(copy.numel() for copy in decay._copies) == sum(parameter.numel() for parameter in parameters)


def test_copies_follow_the_weights_of_the_step() -> None:
    """As where a layer has no gradient in a step, or the precision of the weights is changed."""
    decay = WeightDecay(0.1, cautious=True)
    for ours in (weights(), weights()[:2], weights(torch.float64)):
        alone = [nn.Parameter(weight.detach().clone()) for weight in ours]
        fresh = WeightDecay(0.1, cautious=True)
        for one, parameters in ((decay, ours), (fresh, alone)):
            one.before_step_(parameters, lr=LR)
            torch._foreach_mul_([parameter.data for parameter in parameters], 0.5)
            one.after_step_()
        assert all(torch.equal(weight, wanted) for weight, wanted in zip(ours, alone, strict=True))
        sizes = [[(len(copy), copy.dtype) for copy in one._copies] for one in (decay, fresh)]
        assert sizes[0][: len(sizes[1])] == sizes[1]


def test_a_reset_forgets_a_step_that_was_not_finished_and_a_pickle_has_no_copies() -> None:
    (weight,), decay = weights()[:1], WeightDecay(0.1, cautious=True)
    decay.before_step_([weight], lr=LR)
    copied = pickle.loads(pickle.dumps(decay))
    assert not copied._copies and not copied._waiting
    decay.reset()
    before = weight.detach().clone()
    decay.after_step_()
    assert torch.equal(weight, before) and not decay._copies


# ---- in a fit --------------------------------------------------------------------------------------------------------


class Scheduled(BoringModel):
    """Adam, with a learning rate that falls by half after each step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(model: BoringModel, *callbacks: Any, **options: Any) -> BoringModel:
    defaults: dict[str, Any] = {"max_steps": 4, "limit_val_batches": 0, "accelerator": "cpu", "barebones": True}
    Trainer(callbacks=list(callbacks), **{**defaults, **options}).fit(model)
    return model


class Rates(OptimCallback):
    """Remember by which factor each step multiplied the weights before the optimizer moved them."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before = pl_module.layer.weight.detach().clone()

    def on_before_weight_update(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.factors.append((pl_module.layer.weight / self.before).mean().item())


@pytest.mark.parametrize(
    ("follows_lr", "factors"),
    [
        (True, [0.05, 0.025, 0.0125, 0.00625]),
        ("schedule", [0.05, 0.0125, 0.003125, 0.00078125]),
        (False, [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_it_follows_the_learning_rate(follows_lr: Any, factors: list[float]) -> None:
    seen = Rates()
    fit(Scheduled(), WeightRegularization(WeightDecay(0.5, follows_lr=follows_lr)), seen)
    assert seen.factors == pytest.approx([1.0 - factor for factor in factors], abs=1e-6)


def test_the_largest_rate_of_one_cycle_is_known_from_its_start() -> None:
    class OneCycle(BoringModel):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    rates: list[float] = []
    seen = Rates()
    fit(OneCycle(), WeightRegularization(WeightDecay(0.5, follows_lr="schedule")), seen)
    assert rates[0] < 0.01
    assert seen.factors == pytest.approx([1.0 - 0.5 * lr * lr / 0.2 for lr in rates], abs=1e-6)


def test_the_first_rate_is_the_largest_without_a_scheduler_and_is_saved(tmp_path: Any) -> None:
    class Falling(BoringModel):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.optimizers[0].param_groups[0]["lr"] *= 0.5

    def callbacks() -> list[Any]:
        return [WeightRegularization(WeightDecay(0.5, follows_lr="schedule")), Rates()]

    options: dict[str, Any] = {"limit_val_batches": 0, "accelerator": "cpu", "logger": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    whole, first, second = callbacks(), callbacks(), callbacks()
    Trainer(max_steps=4, callbacks=whole, enable_checkpointing=False, **options).fit(Falling())
    trainer = Trainer(max_steps=2, callbacks=first, enable_checkpointing=False, **options)
    trainer.fit(Falling())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = Trainer(max_steps=4, callbacks=second, enable_checkpointing=False, **options)
    trainer.fit(Falling(), ckpt_path=tmp_path / "half.ckpt")
    assert first[1].factors + second[1].factors == pytest.approx(whole[1].factors)


def test_a_warm_up_by_hand_raises_the_largest_rate() -> None:
    """The first rate is nearly zero: measured by that, the decay would be a thousand times too strong."""

    class Warms(BoringModel):
        rates = (1e-4, 0.05, 0.1, 0.05)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trainer.optimizers[0].param_groups[0]["lr"] = self.rates[batch_idx]

    seen = Rates()
    fit(Warms(), WeightRegularization(WeightDecay(0.5, follows_lr="schedule")), seen)
    assert seen.factors == pytest.approx([1.0 - 0.5 * rate for rate in (1e-4, 0.05, 0.1, 0.025)], abs=1e-6)


@pytest.mark.parametrize("cautious", [False, True])
def test_a_step_that_is_dropped_decays_nothing(cautious: bool) -> None:
    class Dropping(OptimCallback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if self.steps[0] or trainer.global_step:
                drop_step(trainer, optimizer, "a test")

    torch.manual_seed(0)
    one = fit(BoringModel(), WeightRegularization(WeightDecay(0.5, cautious=cautious)), max_steps=1)
    torch.manual_seed(0)
    other = fit(BoringModel(), WeightRegularization(WeightDecay(0.5, cautious=cautious)), Dropping(), max_steps=4)
    assert torch.equal(one.layer.weight, other.layer.weight)


@pytest.mark.parametrize("cautious", [False, True])
def test_a_step_that_the_scaler_skips_decays_nothing(cautious: bool) -> None:
    class Infinite(BoringModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)["loss"]
            return loss * float("inf") if batch_idx == 1 else loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.__dict__.setdefault("seen", []).append(self.layer.weight.detach().clone())

    from tests.lightning import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    model = Infinite()
    decay = WeightRegularization(WeightDecay(0.5, cautious=cautious, follows_lr=False))
    fit(model, decay, plugins=[plugin], max_steps=3)
    first, second, third = model.seen
    assert torch.equal(first, second) and not torch.equal(second, third)
    assert decay.steps == [2]


def test_weights_without_a_gradient_do_not_decay() -> None:
    class Half(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.0)

    model = Half()
    before = model.unused.weight.detach().clone()
    fit(model, WeightRegularization(WeightDecay(0.5)))
    assert torch.equal(model.unused.weight, before)


def test_the_decay_is_of_the_optimizers_move_and_not_of_a_projections() -> None:
    outcomes = []
    for terms in (
        [ProximalL1(0.1), WeightDecay(0.5, cautious=True)],
        [WeightDecay(0.5, cautious=True), ProximalL1(0.1)],
    ):
        torch.manual_seed(0)
        outcomes.append(fit(BoringModel(), WeightRegularization(terms)).layer.weight)
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("cautious_first", [True, False])
def test_the_decay_is_of_the_optimizers_move_and_not_of_another_decays(cautious_first: bool) -> None:
    """The optimizer moves the first weight away from zero, so that only the decay that is not cautious acts on it."""

    class Moves(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1.0, 1.0]]))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.weight * torch.tensor([[-1.0, 1.0]])).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.weight], lr=0.01)

    terms = [WeightDecay(0.1, follows_lr=False, on="weight"), WeightDecay(0.5, True, follows_lr=False, on="weight")]
    model = fit(Moves(), WeightRegularization(terms[::-1] if cautious_first else terms), max_steps=1)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.9 + 0.01, 0.9 - 0.01 - 0.5 * 0.9]]))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: WeightDecay(-1.0), "`strength` must be a number .* >= 0.0, got -1.0"),
        (lambda: WeightDecay(1.5, follows_lr=False), r"`strength` must be a number .* in \[0.0, 1.0\], got 1.5"),
        (lambda: WeightDecay(0.1, cautious=1), "`cautious` must be one of True, False, got 1"),
        (lambda: WeightDecay(0.1, follows_lr="lr"), "`follows_lr` must be one of True, False, 'schedule', got 'lr'"),
    ],
)
def test_wrong_arguments(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
