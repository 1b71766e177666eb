"""Variants of the loop by hand: another network, another precision, an infinity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.machine import problem
from tests.machine.by_hand import Loop, Outcome, Weights, autocast
from tests.machine.cells import INIT_SCALE, MOMENTUM, Cell
from tests.registry import Entry


class Variant(Loop):
    """The loop with another network and another loss."""

    def __init__(self, cell: Cell, entry: Entry, **changes: Any) -> None:
        super().__init__(cell, entry.formula(cell), entry.scores, **({"epochs": entry.epochs} | changes))
        self.net = self.build()
        self.nets = problem.nets_of(self.net)
        self.optimizers = [SGD(net.parameters(), lr=cell.lr, momentum=MOMENTUM) for net in self.nets]
        self.batches = [self.convert(batch) for batch in self.batches]

    def build(self) -> nn.Module:
        return problem.build_nets(self.cell.optimizers)

    def convert(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch

    def loss(self, index: int, nets: Sequence[nn.Module], batch: tuple[Tensor, Tensor]) -> Tensor:
        return problem.loss_of(index, nets, batch)

    def _backward(self, index: int, batch: tuple[Tensor, Tensor], size: int) -> None:
        with autocast(self.cell.precision):
            loss = self.loss(index, self.nets, batch)
        parameters = list(self.nets[index].parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss / size, parameters), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def evaluated(self) -> Weights:
        # One network's mean may have begun when that of another, whose step was skipped, has not.
        known = getattr(self.formula, "history", None) or self.weights
        return self.weights | self.formula.evaluated({name: w for name, w in self.weights.items() if name in known})

    @torch.no_grad()
    def _validate(self) -> bool:
        evaluated = self.evaluated()
        net = self.build()
        net.load_state_dict({name.removeprefix("net."): weight for name, weight in evaluated.items()})
        nets, batch = problem.nets_of(net), self.convert(problem.validation_batch())
        with autocast(self.cell.precision):
            losses = [self.loss(index, nets, batch) for index in range(len(nets))]
        self.outcome.validations.append(float(torch.stack(losses).sum()))
        score = self.scores[len(self.outcome.validations) - 1] if self.scores else self.outcome.validations[-1]
        return self.formula.stop(score, evaluated)


class Infinite(Variant):
    """One loss is infinite; a scaler by hand, which skips that step and halves its scale."""

    def __init__(self, cell: Cell, entry: Entry, batch: int) -> None:
        super().__init__(cell, entry)
        self.infinite, self.scale, self.skipped = batch, INIT_SCALE, 0
        self.calls = [0] * cell.optimizers

    def _backward(self, index: int, batch: tuple[Tensor, Tensor], size: int) -> None:
        with autocast(self.cell.precision):
            loss = self.loss(index, self.nets, batch) / size
        if index == 0 and self.outcome.seen == self.infinite:
            loss = loss * float("inf")
        parameters = list(self.nets[index].parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss * self.scale, parameters), strict=True):
            gradient = gradient / self.scale
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _step(self, index: int) -> None:
        optimizer = self.optimizers[index]
        if all(bool(p.grad.isfinite().all()) for p in self.nets[index].parameters() if p.grad is not None):
            step = self._describe(index)
            if getattr(self.formula, "by_epoch", False):
                step.step = self.calls[index]  # which tells the end of an epoch also if a step was skipped in it
            with torch.no_grad():
                self.formula.before_step(step)
                optimizer.step()
                self.formula.after_step(step)
            self.steps[index] += 1
        else:
            self.skipped += 1
            self.scale /= 2
        self.calls[index] += 1
        optimizer.zero_grad()


class Half(Variant):
    """Everything in bfloat16; the formulas see copies in 32 bit, and what each writes is rounded."""

    def build(self) -> nn.Module:
        return super().build().to(torch.bfloat16)

    def convert(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
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
