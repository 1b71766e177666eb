"""Reference formulas of what changes the loss of a micro-batch, or adds a term to it."""

from __future__ import annotations

from torch import Tensor, nn

from tests.harness.reference_loop import Formula, Loop, Step


class Flood(Formula):
    """Minimize ``|loss - level| + level``; the level is ``low``, and ``high`` from the middle of the run on."""

    def __init__(self, low: float, high: float) -> None:
        self.low = low
        self.high = high
        self.batch = -1
        self.level = low

    def attach(self, loop: Loop) -> None:
        self.loop = loop

    def loss(self, loss: Tensor, index: int) -> Tensor:
        if self.batch != self.loop.outcome.seen:  # the level is set when a batch starts
            self.batch = self.loop.outcome.seen
            self.level = self.low if self.loop.steps[0] / (self.loop.total - 1) < 0.5 else self.high
        return (loss - self.level).abs() + self.level


class PenalizeOutputs(Formula):
    """Add ``sum(l1 |y| + l2 y^2) / batch`` of the hidden layer's output to each loss that is computed from it."""

    def __init__(self, l1: float, l2: float) -> None:
        self.l1 = l1
        self.l2 = l2
        self.outputs: list[Tensor] = []
        self.values: dict[str, float] = {}

    def attach(self, loop: Loop) -> None:
        self.loop = loop
        for net in loop.nets:
            net.get_submodule("inner").register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.outputs.append(output)

    def loss(self, loss: Tensor, index: int) -> Tensor:
        self.values = dict.fromkeys(("l1", "l2"), 0.0)
        for output in self.outputs:
            for row in output.float():
                absolute, squares = row.abs().sum() / len(output), (row * row).sum() / len(output)
                loss = loss + self.l1 * absolute + self.l2 * squares
                self.values["l1"] += self.l1 * float(absolute.detach())
                self.values["l2"] += self.l2 * float(squares.detach())
        self.outputs = []
        return loss

    def before_step(self, step: Step) -> None:
        if self.loop.cell.optimizers == 1:  # with several it is logged once for a batch, without the optimizer's index
            step.logged |= {f"regularization/activations/{name}": value for name, value in self.values.items()}
