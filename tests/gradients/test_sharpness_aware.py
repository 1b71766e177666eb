"""SharpnessAwareMixin: every cell, another implementation bit for bit, and side effects of the second pass."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from pytorch_optimizer import SAM
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_optim import ClipByNorm, GradientAccumulation, GradientClipping, SharpnessAwareMixin
from tests.harness import models, regression, run
from tests.harness.cells import CELLS, Cell
from tests.harness.process_group import Group
from tests.harness.reference_loop import Formula as Plain
from tests.harness.reference_loop import Loop, Outcome, autocast, deviation
from tests.lightning import Closure, GradientAccumulationScheduler, LightningModule, MisconfigurationException

RHO = 0.5
BY_HAND = "set `automatic_optimization = True`"
ACCUMULATES = "remove the accumulation, and make the batches larger"


class TwoPasses(Loop):
    """Compute the gradient at ``w + rho g / |g|``, or with ``adaptive`` at ``w + rho w^2 g / | |w| g |``."""

    adaptive = False

    def _backward(self, index: int, batch: Any, size: int) -> None:
        parameters = list(self.nets[index].parameters())
        first = self._gradients(index, batch)
        sizes = [p.detach().abs() if self.adaptive else torch.ones_like(p) for p in parameters]
        length = sum(float((g * s).square().sum()) for g, s in zip(first, sizes, strict=True)) ** 0.5
        kept = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, gradient, s in zip(parameters, first, sizes, strict=True):
                parameter += RHO * s * s * gradient / length
        second = self._gradients(index, batch)
        with torch.no_grad():
            for parameter, gradient, weight in zip(parameters, second, kept, strict=True):
                parameter.copy_(weight)
                parameter.grad = gradient

    def _gradients(self, index: int, batch: Any) -> Any:
        with autocast(self.cell.precision):
            loss = regression.loss_of(index, self.nets, batch)
        return torch.autograd.grad(self.scaler.scale(loss), list(self.nets[index].parameters()))


class AdaptiveTwoPasses(TwoPasses):
    adaptive = True


@functools.cache
def _reference(cell: Cell, adaptive: bool) -> Outcome:
    return (AdaptiveTwoPasses if adaptive else TwoPasses)(cell, Plain()).run()


@functools.cache
def _plain(cell: Cell) -> Outcome:
    return Loop(cell, Plain()).run()


def _module(cell: Cell, adaptive: bool) -> Any:
    class Sharp(SharpnessAwareMixin, type(models.build(cell))):  # type: ignore[misc]
        pass

    return Sharp(cell, rho=RHO, adaptive=adaptive)


def job(cell: Cell, adaptive: bool) -> Any:
    callbacks = [GradientAccumulation(cell.accumulation)] if cell.accumulation > 1 else []
    module = _module(cell, adaptive)
    try:
        run.make_trainer(cell, callbacks).fit(module)
    except MisconfigurationException as refusal:
        return str(refusal)  # in a group an exception would end the processes
    return module.raw, module.validations, module.seen


def _fit(cell: Cell, adaptive: bool, group: Group) -> Any:
    return [job(cell, adaptive)] if cell.processes == 1 else group.run(job, cell, adaptive)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell, group: Group) -> None:
    adaptive = cell.precision == "16-mixed"
    results = _fit(cell, adaptive, group)
    if cell.kind != "automatic" or cell.accumulation > 1:
        sentence = BY_HAND if cell.kind != "automatic" else ACCUMULATES
        assert [sentence in refusal for refusal in results] == [True] * cell.processes
        return
    reference, plain = _reference(cell.whole, adaptive), _plain(cell.whole)
    for raw, validations, seen in results:
        assert max(deviation(raw, reference.raw).values()) <= cell.tolerance
        assert validations == pytest.approx(reference.validations, rel=cell.value_tolerance)
        assert seen == 2 * reference.seen, "two passes for each batch"
    assert max(deviation(reference.raw, plain.raw).values()) >= 20 * cell.tolerance


@pytest.mark.parametrize("adaptive", [False, True])
def test_both_kinds_in_32_true(adaptive: bool, group: Group) -> None:
    for strategy in ("single", "ddp", "fsdp2"):
        cell = Cell("automatic", "32-true", strategy, "1")  # type: ignore[arg-type]
        for raw, *_ in _fit(cell, adaptive, group):
            assert max(deviation(raw, _reference(cell.whole, adaptive).raw).values()) < 1e-6


# ---- a peer, dropout and BatchNorm -----------------------------------------------------------------------------------


class Sharp(SharpnessAwareMixin, LightningModule):
    """Network with dropout and BatchNorm, whose training step logs values."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, regression.TARGETS)
        )
        self.passes: list[tuple[bool, float]] = []
        self.masks: list[Tensor] = []
        self.net[3].register_forward_hook(lambda module, args, out: self.masks.append(out == 0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = mse_loss(self.net(batch[0]), batch[1])
        self.passes.append((self.second_pass, loss.item()))
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"twice": 2 * loss})
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.reported = outputs["loss"].item()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def _train(module: Any, *callbacks: Any, **changes: Any) -> dict[str, dict[int, float]]:
    recorder = run.Recorder()
    batches = models.Batches(regression.make_batches(6, seed=3))
    torch.manual_seed(1)
    cell = Cell("automatic", "32-true", "single", "1")
    arguments = {"logger": recorder, "max_epochs": 1, "limit_val_batches": 0} | changes
    run.make_trainer(cell, callbacks, **arguments).fit(module, batches)
    return recorder.logged


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_equal_to_a_peer_to_the_bit(adaptive: bool, clip: float | None) -> None:
    module = Sharp(rho=0.1, adaptive=adaptive)
    _train(module, *([] if clip is None else [GradientClipping(ClipByNorm(clip))]))

    peer = Sharp().train()
    torch.manual_seed(1)
    optimizer = SAM(peer.net.parameters(), torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.1, momentum=0.9)
    statistics = list(peer.net[1].buffers())
    for x, y in regression.make_batches(6, seed=3):
        draws = torch.get_rng_state()
        optimizer.zero_grad()
        mse_loss(peer.net(x), y).backward()
        kept = [buffer.clone() for buffer in statistics]
        optimizer.first_step(zero_grad=True)
        torch.set_rng_state(draws)
        mse_loss(peer.net(x), y).backward()
        for buffer, before in zip(statistics, kept, strict=True):
            buffer.copy_(before)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(peer.net.parameters(), clip)
        optimizer.second_step(zero_grad=True)
    for name, value in module.net.state_dict().items():
        assert torch.equal(value, peer.net.state_dict()[name]), name


def test_the_second_pass_draws_the_same_masks_and_leaves_statistics_and_logs_alone() -> None:
    module = Sharp()
    logged = _train(module)
    assert [second for second, _ in module.passes] == [False, True] * 6
    assert all(torch.equal(a, b) for a, b in zip(module.masks[::2], module.masks[1::2], strict=True))
    assert not torch.equal(module.masks[0], module.masks[2])
    assert module.net[1].num_batches_tracked == 6
    first = [loss for second, loss in module.passes if not second]
    assert first != [loss for second, loss in module.passes if second]
    assert list(logged["loss_step"].values()) == pytest.approx(first)
    assert list(logged["loss_epoch"].values()) == pytest.approx([sum(first) / 6])
    assert list(logged["twice"].values()) == pytest.approx([2 * loss for loss in first])
    assert module.reported == pytest.approx(first[-1])
    assert not module.second_pass


class Failing(Sharp):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.second_pass:
            raise ValueError("in the second pass")
        self.before = [p.detach().clone() for p in self.parameters()]
        return super().training_step(batch, batch_idx)


def test_an_exception_in_the_second_pass_leaves_the_weights_as_they_were() -> None:
    module = Failing(rho=1.0)
    with pytest.raises(ValueError, match="in the second pass"):
        _train(module)
    assert all(torch.equal(a, b) for a, b in zip(module.before, module.parameters(), strict=True))
    assert not module.second_pass


class Nothing(Sharp):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        pass


def test_a_step_that_is_cancelled_has_no_second_pass() -> None:
    module = Nothing()
    Closure.warning_cache.clear()  # Lightning says it once in a process
    with pytest.warns(UserWarning, match="returned `None`"):
        _train(module)
    assert [second for second, _ in module.passes] == [False, True] * 3


class Infinite(Sharp):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 2 else 1.0)


def test_a_first_gradient_that_is_not_finite_is_skipped_with_its_step() -> None:
    module, clipping = Infinite(), GradientClipping(1.0)
    _train(module, clipping)
    assert clipping.skipped == [1]
    assert all(p.isfinite().all() for p in module.parameters())


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callbacks", "changes"),
    [
        ([GradientAccumulation(2)], {}),
        ([GradientAccumulation(1)], {}),
        ([GradientAccumulationScheduler({1: 2})], {}),
        ([], {"accumulate_grad_batches": 2}),
    ],
)
def test_accumulation_is_refused(callbacks: Any, changes: Any) -> None:
    with pytest.raises(MisconfigurationException, match=ACCUMULATES):
        _train(Sharp(), *callbacks, **changes)


class Stubborn(Sharp):
    """Override the hook that refuses, and call the optimizer's step itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def on_fit_start(self) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(mse_loss(self.net(batch[0]), batch[1]))


def test_manual_optimization_is_refused_even_without_its_hook() -> None:
    with pytest.raises(MisconfigurationException, match=BY_HAND):
        _train(Stubborn())


class Quasi(Sharp):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


def test_lbfgs_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="LBFGS many: use a first-order optimizer"):
        _train(Quasi())


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan"), "0.1"])
def test_a_wrong_rho_is_refused(rho: Any) -> None:
    with pytest.raises(ValueError, match=r"`rho` must be a number > 0\.0"):
        Sharp(rho=rho)
