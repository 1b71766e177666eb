"""Train in plain torch: one process, the whole batch, the same precision, and a technique as a formula.

The loop imports neither lightning nor lightning_optim, so that it shares no error with them.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import SGD

from tests.harness import regression
from tests.harness.cells import EPOCHS, INIT_SCALE, MOMENTUM, Cell, Precision

Weights = dict[str, Tensor]


@dataclass
class Step:
    """Step of one optimizer: its own weights and their gradients, in the same order.

    Attributes:
        step: Number of steps that this optimizer has taken before.
        total: Number of steps that it takes in the run.
        logged: Values that the formula logs in this step, by name.
    """

    optimizer: int
    step: int
    total: int
    lr: float
    names: list[str]
    weights: list[Tensor]
    grads: list[Tensor]
    logged: dict[str, float] = field(default_factory=dict)


class Formula:
    """Base class of a technique in the reference loop. It changes nothing: the plain model."""

    def attach(self, loop: Loop) -> None:
        """Add hooks to the networks that train; validation uses separate networks."""

    def window(self, accumulation: int, epoch: int) -> int:
        """Return the number of micro-batches of a full window in this epoch."""
        return accumulation

    def loss(self, loss: Tensor, index: int) -> Tensor:
        """Return the loss of a micro-batch that optimizer ``index`` minimizes, given that of the task."""
        return loss

    def before_step(self, step: Step) -> None:
        """Change the gradients in place."""

    def after_step(self, step: Step) -> None:
        """Change the weights in place, or store them."""

    def after_epoch(self, weights: Weights) -> None:
        """Read the live weights after the last step of an epoch, before the validation there."""

    def evaluated(self, weights: Weights) -> Weights:
        """Return the weights to validate, given the live weights that train: clone them to keep them."""
        return weights

    def stop(self, score: float, weights: Weights) -> bool:
        """Return True to end the run after this validation of ``weights`` with this score."""
        return False

    def candidate(self) -> Weights:
        """Return weights for one more validation after the run; default: no such validation."""
        return {}

    def judge(self, score: float) -> None:
        """Read the score of :meth:`candidate`: the loss, or the next scripted score."""

    def final(self, weights: Weights) -> Weights:
        """Return the weights of the module after the run, given the weights that trained."""
        return weights


class Chain(Formula):
    """Apply several formulas, each to the result of the one before it."""

    def __init__(self, *formulas: Formula) -> None:
        self.formulas = formulas

    def attach(self, loop: Loop) -> None:
        for formula in self.formulas:
            formula.attach(loop)

    def window(self, accumulation: int, epoch: int) -> int:
        for formula in self.formulas:
            accumulation = formula.window(accumulation, epoch)
        return accumulation

    def loss(self, loss: Tensor, index: int) -> Tensor:
        for formula in self.formulas:
            loss = formula.loss(loss, index)
        return loss

    def before_step(self, step: Step) -> None:
        for formula in self.formulas:
            formula.before_step(step)

    def after_step(self, step: Step) -> None:
        for formula in self.formulas:
            formula.after_step(step)

    def after_epoch(self, weights: Weights) -> None:
        for formula in self.formulas:
            formula.after_epoch(weights)

    def evaluated(self, weights: Weights) -> Weights:
        for formula in self.formulas:
            weights = formula.evaluated(weights)
        return weights

    def stop(self, score: float, weights: Weights) -> bool:
        return any([formula.stop(score, weights) for formula in self.formulas])

    def final(self, weights: Weights) -> Weights:
        for formula in self.formulas:
            weights = formula.final(weights)
        return weights


@dataclass
class Outcome:
    """Results of a run of the reference loop or of a fit.

    Attributes:
        final: Weights of the module after the run.
        raw: Raw weights at the end of training.
        validations: Validation losses in their order.
        seen: Number of micro-batches that were trained on.
        logged: Values of each logged name, by the step of the logger.
    """

    final: Weights
    raw: Weights
    validations: list[float]
    seen: int
    logged: dict[str, dict[int, float]]


class Loop:
    """Run SGD with momentum on the regression of a cell."""

    def __init__(self, cell: Cell, formula: Formula, scores: tuple[float, ...] = (), epochs: int = EPOCHS) -> None:
        self.cell = cell
        self.formula = formula
        self.scores = scores
        self.epochs = epochs
        self.net = regression.build_nets(cell.optimizers)
        self.nets = regression.nets_of(self.net)
        self.optimizers = [SGD(net.parameters(), lr=cell.lr, momentum=MOMENTUM) for net in self.nets]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE, enabled=cell.precision == "16-mixed")
        self.batches = regression.make_batches(cell.batches, seed=10)
        self.steps = [0] * cell.optimizers
        self.total = sum(-(-cell.batches // formula.window(cell.accumulation, epoch)) for epoch in range(epochs))
        self.outcome = Outcome({}, {}, [], 0, {})
        formula.attach(self)

    @property
    def weights(self) -> Weights:
        return {f"net.{name}": parameter.detach() for name, parameter in self.net.named_parameters()}

    def run(self) -> Outcome:
        self._train()
        if candidate := self.formula.candidate():
            self.formula.judge(self._score(candidate))
        self.outcome.raw = {name: weight.clone() for name, weight in self.weights.items()}
        self.outcome.final = {name: weight.clone() for name, weight in self.formula.final(self.weights).items()}
        return self.outcome

    def _train(self) -> None:
        for epoch in range(self.epochs):
            window = self.formula.window(self.cell.accumulation, epoch)
            for position, batch in enumerate(self.batches):
                start = position - position % window
                size = min(window, len(self.batches) - start)
                for index in range(len(self.optimizers)):
                    self._backward(index, batch, size)
                    if position == start + size - 1:
                        self._step(index)
                self.outcome.seen += 1
                if position == len(self.batches) - 1:
                    self.formula.after_epoch(self.weights)
                if (position + 1) % self.cell.validate_every == 0 and self._validate():
                    return

    def _backward(self, index: int, batch: regression.Batch, size: int) -> None:
        with autocast(self.cell.precision):
            loss = regression.loss_of(index, self.nets, batch)
        loss = self.formula.loss(loss, index)
        parameters = list(self.nets[index].parameters())
        gradients = torch.autograd.grad(self.scaler.scale(loss / size), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _step(self, index: int) -> None:
        optimizer = self.optimizers[index]
        self.scaler.unscale_(optimizer)
        step = self._describe(index)
        with torch.no_grad():
            self.formula.before_step(step)
        self.scaler.step(optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.formula.after_step(step)
        self._log(index, step.logged)
        optimizer.zero_grad()
        self.steps[index] += 1

    def _describe(self, index: int) -> Step:
        prefix = "net." if self.cell.optimizers == 1 else f"net.{index}."
        named = [(prefix + name, parameter) for name, parameter in self.nets[index].named_parameters()]
        grads = [parameter.grad for _, parameter in named if parameter.grad is not None]
        weights = [parameter.detach() for _, parameter in named]
        names = [name for name, _ in named]
        return Step(index, self.steps[index], self.total, self.cell.lr, names, weights, grads)

    def _log(self, index: int, values: dict[str, float]) -> None:
        # Lightning counts the steps for a logger; under manual optimization it takes every micro-batch for one.
        position = self.steps[index] if self.cell.kind == "automatic" else self.outcome.seen
        suffix = f"/{index}" if self.cell.optimizers > 1 else ""
        for name, value in values.items():
            self.outcome.logged.setdefault(name + suffix, {})[position] = value

    @torch.no_grad()
    def _loss_of(self, weights: Weights) -> float:
        net = regression.build_nets(self.cell.optimizers)
        net.load_state_dict({name.removeprefix("net."): weight for name, weight in weights.items()})
        with autocast(self.cell.precision):
            return float(regression.validation_loss(regression.nets_of(net), regression.validation_batch()))

    def _score(self, weights: Weights) -> float:
        validations = self.outcome.validations
        validations.append(self._loss_of(weights))
        return self.scores[len(validations) - 1] if self.scores else validations[-1]

    def _validate(self) -> bool:
        evaluated = self.formula.evaluated(self.weights)
        return self.formula.stop(self._score(evaluated), evaluated)


def autocast(precision: Precision) -> AbstractContextManager[object]:
    """Context manager: the forward pass runs as under Lightning at this precision."""
    if precision == "32-true":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    return torch.autocast("cpu", dtype=dtype, cache_enabled=False)


def deviation(one: Weights, other: Weights) -> dict[str, float]:
    """Return the largest ``|a - b| / (1 + |b|)`` of each name; infinity if there is a NaN."""
    assert one.keys() == other.keys(), f"names differ: {sorted(one.keys() ^ other.keys())}"
    return {name: _deviation(one[name], other[name]) for name in one}


def _deviation(a: Tensor, b: Tensor) -> float:
    largest = float(((a - b).abs() / (1.0 + b.abs())).max())
    return math.inf if math.isnan(largest) else largest
