"""Every entry under tensor parallelism (shards, partial gradients, a plain parameter) equals one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import gelu, mse_loss

from tests.harness import regression, run
from tests.harness.process_group import Group
from tests.integration import reference_variants
from tests.integration.entry_fits import CELL, each_entry, fit
from tests.lightning import ModelParallelStrategy
from tests.registry import BY_NAME, Entry, refused
from tests.test_matrix import assert_effect, assert_equal

HIDDEN = 8  # Each rank holds four features.


class SplitNet(nn.Module):
    """A norm over shards of the batch, a column-parallel and a row-parallel layer, and a plain parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(regression.FEATURES)
        self.inner = nn.Linear(regression.FEATURES, HIDDEN)
        self.outer = nn.Linear(HIDDEN, regression.TARGETS)
        self.scale = nn.Parameter(torch.empty(regression.TARGETS))
        filler = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            regression.away_from_zero_(parameter, filler)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(gelu(self.inner(self.norm(x)))) * self.scale


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return mse_loss(net(x), y)


class Split(reference_variants.Variant):
    def build(self) -> nn.Module:
        return SplitNet()

    def loss(self, index: int, nets: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(nets[0], batch)

    def validation_loss(self, nets: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(nets[0], batch)


class TensorParallel:
    """Trait: the same network as a Lightning module, parallel over two processes."""

    def __init__(self: Any, *args: Any) -> None:
        super().__init__(*args)  # type: ignore[call-arg]
        self.net = SplitNet()
        self.partial: set[str] = set()

    def configure_model(self: Any) -> None:
        mesh = self.device_mesh["tensor_parallel"]
        split = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0), use_local_output=True)
        plan = {
            "norm": SequenceParallel(sequence_dim=0),
            "inner": ColwiseParallel(input_layouts=Shard(0)),
            "outer": RowwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(parallelize_module(self.net, mesh, split), mesh, plan)

    def _part(self, batch: Any) -> Any:
        return batch

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        return loss_of(self.net, batch)

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.net, batch))

    def on_after_backward(self: Any) -> None:
        for name, parameter in self.named_parameters():
            if isinstance(parameter.grad, DTensor) and parameter.grad.placements[0].is_partial():
                self.partial.add(name)


def job(name: str) -> Any:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    fitted = fit(BY_NAME[name], CELL, TensorParallel, strategy=strategy, devices=2, plugins=[run.LivingEnvironment()])
    kinds = {name: type(parameter) is nn.Parameter for name, parameter in fitted.module.named_parameters()}
    return fitted.outcome, fitted.module.partial, kinds


@each_entry
def test_tensor_parallel(entry: Entry, group: Group) -> None:
    if refused(entry, (0, 1), lambda: group.run(job, entry.name)):
        return
    expected = Split(CELL, entry).run()
    for name in [name for name in expected.logged if name.startswith("regularization/activations/")]:
        del expected.logged[name]  # not logged, since a process holds a part of the outputs
    for outcome, partial, plain in group.run(job, entry.name):
        assert partial == {"net.norm.weight", "net.norm.bias"}
        assert plain["net.scale"]
        assert_equal(outcome, expected, CELL)
    without = Split(CELL, replace(entry, formula=entry.without)).run()
    assert_effect(entry, expected, without, CELL)


def test_the_loop_would_see_a_partial_gradient_counted_twice() -> None:
    """A penalty on the summands of two ranks is twice the penalty: more than the tolerance."""
    entry = BY_NAME["elastic_net_on_all"]
    once = Split(CELL, entry).run()
    twice = Split(CELL, entry)
    twice.formula.before_step = _on_norm_twice(twice.formula.before_step)  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="the weights that trained differ"):
        assert_equal(twice.run(), once, CELL)


def _on_norm_twice(before_step: Any) -> Any:
    def changed(step: Any) -> None:
        kept = [grad.clone() for grad in step.grads]
        before_step(step)
        for name, grad, before in zip(step.names, step.grads, kept, strict=True):
            if "norm" in name:
                grad += grad - before

    return changed
