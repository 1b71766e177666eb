"""Variants of the reference loop: another network, another precision, a step with an infinite loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.harness import regression
from tests.harness.cells import INIT_SCALE, MOMENTUM, Cell
from tests.harness.reference_loop import Loop, Outcome, Weights, autocast
from tests.harness.regression import Batch
from tests.registry import Entry


class Variant(Loop):
    """The reference loop with another network and another loss."""

    def __init__(self, cell: Cell, entry: Entry, **changes: Any) -> None:
        super().__init__(cell, entry.formula(cell), entry.scores, **({"epochs": entry.epochs} | changes))
        self.net = self.build()
        self.nets = regression.nets_of(self.net)
        self.optimizers = [SGD(net.parameters(), lr=cell.lr, momentum=MOMENTUM) for net in self.nets]
        self.batches = [self.convert(batch) for batch in self.batches]
        self.scale = 1.0
        self.formula.attach(self)

    def build(self) -> nn.Module:
        return regression.build_nets(self.cell.optimizers)

    def convert(self, batch: Batch) -> Batch:
        return batch

    def loss(self, index: int, nets: Sequence[nn.Module], batch: Batch) -> Tensor:
        return regression.loss_of(index, nets, batch)

    def validation_loss(self, nets: Sequence[nn.Module], batch: Batch) -> Tensor:
        return regression.validation_loss(nets, batch)

    def _backward(self, index: int, batch: Batch, size: int) -> None:
        with autocast(self.cell.precision):
            loss = self.loss(index, self.nets, batch)
        loss = self.formula.loss(loss, index)
        parameters = list(self.nets[index].parameters())
        gradients = torch.autograd.grad(loss / size * self.scale, parameters)
        for parameter, scaled in zip(parameters, gradients, strict=True):
            gradient = scaled / self.scale
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    @torch.no_grad()
    def _loss_of(self, weights: Weights) -> float:
        net = self.build()
        net.load_state_dict({name.removeprefix("net."): weight for name, weight in weights.items()})
        with autocast(self.cell.precision):
            return float(self.validation_loss(regression.nets_of(net), self.convert(regression.validation_batch())))


class Infinite(Variant):
    """The reference loop with a loss infinite in one batch: that step is skipped and the loss scale halved."""

    def __init__(self, cell: Cell, entry: Entry, batch: int) -> None:
        super().__init__(cell, entry)
        self.infinite, self.scale, self.skipped = batch, INIT_SCALE, 0

    def loss(self, index: int, nets: Sequence[nn.Module], batch: Batch) -> Tensor:
        loss = super().loss(index, nets, batch)
        return loss * float("inf") if index == 0 and self.outcome.seen == self.infinite else loss

    def _step(self, index: int) -> None:
        optimizer = self.optimizers[index]
        if all(bool(p.grad.isfinite().all()) for p in self.nets[index].parameters() if p.grad is not None):
            step = self._describe(index)
            with torch.no_grad():
                self.formula.before_step(step)
                optimizer.step()
                self.formula.after_step(step)
            self.steps[index] += 1
        else:
            self.skipped += 1
            self.scale /= 2
        optimizer.zero_grad()


class Half(Variant):
    """The reference loop in bfloat16. Formulas see copies in 32 bit, and the tensors that they write are rounded."""

    def build(self) -> nn.Module:
        return super().build().to(torch.bfloat16)

    def convert(self, batch: Batch) -> Batch:
        x, y = batch
        return x.bfloat16(), y.bfloat16()

    def run(self) -> Outcome:
        outcome = super().run()
        outcome.final = {name: weight.bfloat16() for name, weight in outcome.final.items()}
        return outcome

    def _step(self, index: int) -> None:
        optimizer, step = self.optimizers[index], self._describe(index)
        live = step.grads, step.weights
        with torch.no_grad():
            step.grads, step.weights = ([tensor.float() for tensor in tensors] for tensors in live)
            for formula in getattr(self.formula, "formulas", [self.formula]):
                formula.before_step(step)
                _copy_(live[0], step.grads)
                _copy_(step.grads, live[0])
                _copy_(live[1], step.weights)
            optimizer.step()
            _copy_(step.weights, live[1])
            self.formula.after_step(step)
            _copy_(live[1], step.weights)
        self._log(index, step.logged)
        optimizer.zero_grad()
        self.steps[index] += 1


def _copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
