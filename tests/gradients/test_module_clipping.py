"""A module that clips its gradients itself, beside GradientClipping, is told of once; one that does not is not."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from lightning_optim import Centralize, ClipByNorm, GradientClipping, GradientMonitor, ManualOptimizationMixin
from tests.averaging.models import Model, assert_equal, fit, snapshot
from tests.lightning import Callback, LightningModule

MODULES: dict[str, Any] = {}


def clipping(kind: type) -> type:
    MODULES[kind.__name__] = kind
    return kind


@clipping
class ByTorch(Model):
    """As modules of NeMo do."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        clip_grad_norm_(self.parameters(), 1e6)


@clipping
class ByLightning(Model):
    """As modules of lightly do: with a value of its own."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=3.0, gradient_clip_algorithm="norm")


@clipping
class ByReplacing(Model):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for parameter in self.parameters():
            parameter.grad = parameter.grad.clamp(-1.0, 1.0)


@clipping
class InTheStep(Model):
    def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, closure: Any) -> None:
        def clipped() -> Any:
            loss = closure()
            self.clip_gradients(optimizer, 3.0, "value")
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, clipped)


@clipping
class ByHand(Model):
    """Manual optimization, as Lightning's docs write it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()


class PassesOn(Model):
    """The example of Lightning's docs."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.clip_gradients(
            optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
        )


class OnlyIfAsked(Model):
    """As models of NeMo for Megatron do."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.gradient_clip_val is not None:
            clip_grad_norm_(self.parameters(), self.trainer.gradient_clip_val)


class Measures(Model):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.norm = torch.stack([parameter.grad.norm() for parameter in self.parameters()]).norm()


class Mixed(ManualOptimizationMixin, Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimize(super().training_step(batch, batch_idx), self.optimizers())


class Scales(Callback):
    """Changes gradients after GradientClipping, before the module's hook."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.grad.mul_(0.5)


def said(module: LightningModule, *callbacks: Callback, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, callbacks, **options)
    return [str(one.message) for one in caught if "clips them too" in str(one.message)]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_clips_is_told_of_once(name: str) -> None:
    (sentence,) = said(MODULES[name](), GradientClipping(1.0))
    writes = name in ("ByTorch", "ByReplacing")
    does = "writes to its gradients in `configure_gradient_clipping`" if writes else "clips its gradients with `clip_gr"
    assert sentence.startswith(f"{name} {does}") and "To clip once, " in sentence
    assert f"turn off the clipping of {name}" in sentence and "`GradientClipping(float('inf'))`" in sentence


def test_the_way_out_is_silent_and_skips_all_the_same() -> None:
    class Infinite(ByTorch):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 3 else 1.0)

    ours = GradientClipping(float("inf"))
    assert said(Infinite(), ours) == []
    assert ours.skipped == [2]


@pytest.mark.parametrize("kind", [Model, PassesOn, OnlyIfAsked, Measures, Mixed])
@pytest.mark.parametrize("others", [(), (Scales(),)], ids=["alone", "beside a callback that writes"])
def test_a_module_that_does_not_clip_is_not(kind: Any, others: Any) -> None:
    assert said(kind(), GradientClipping(1.0), *others) == []


@pytest.mark.parametrize("callback", [GradientMonitor(), GradientClipping(Centralize())], ids=repr)
def test_callbacks_that_do_not_clip_say_nothing(callback: Callback) -> None:
    assert said(ByTorch(), callback) == []


class ClipsOneOfTwo(Model):
    """Clips the gradients of its first optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[index].parameters(), lr=0.05) for index in (0, 2)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(first, 0.5, "norm")
        first.step()
        second.step()


@pytest.mark.parametrize(("on", "count"), [("net.0.*", 1), ("net.2.*", 0), (None, 1)])
def test_gradients_that_only_one_of_them_clips(on: Any, count: int) -> None:
    assert len(said(ClipsOneOfTwo(), GradientClipping([Centralize(), ClipByNorm(1.0, on=on)]))) == count


def test_several_fits_and_policies() -> None:
    ours = GradientClipping([Centralize(), ClipByNorm(1.0)])
    assert len(said(module := ByTorch(), ours)) == len(said(module, ours)) == 1
    assert "configure_gradient_clipping" not in vars(module)


class CopiesTheModule(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]


class Plain(ByTorch):
    """Can be pickled in the middle of a fit."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}


def test_a_module_that_is_copied_in_the_fit_has_its_own_hook() -> None:
    copies = CopiesTheModule()
    said(Plain(), GradientClipping(1.0), copies)
    for module in copies.copies:
        assert module.configure_gradient_clipping.__self__ is module
        assert type(module).configure_gradient_clipping is ByTorch.configure_gradient_clipping


def test_the_module_clips_as_before() -> None:
    class Strong(Model):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            clip_grad_norm_(self.parameters(), 0.01)

    said(alone := Strong())
    said(beside := Strong(), GradientClipping(1e3))
    assert_equal(snapshot(beside), snapshot(alone))
