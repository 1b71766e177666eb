"""Penalties on weights, as a callback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import tensors
from lightning_optim.callback import OptimCallback
from lightning_optim.fit import has_gradients
from lightning_optim.policy import PerOptimizer
from lightning_optim.refusals import refuse_parts
from lightning_optim.regularization.penalties import Penalty
from lightning_optim.slots import Slot


class WeightRegularization(OptimCallback):
    r"""Add penalties on the weights to the loss: :math:`g \leftarrow g + \nabla_w \sum_i P_i(w)`, before clipping.

    The gradient is added in closed form once per optimizer step, when gradients are whole, averaged over ranks and
    unscaled: no autograd graph, and no factor for accumulation or a loss scale. The logged training loss stays the
    task's. Values are logged as ``regularization/l1``, ``regularization/l2``, …, each in the unit of the loss.

    A penalty acts on the parameters of the optimizer that steps, where they are trainable. One that has no gradient
    gets one, unless none has: then somebody cancelled the step.

    Args:
        terms: One penalty, or a list: their sum. Each chooses its own parameters; by default those with two dimensions
            or more.
        name: Tells two callbacks with the same terms apart in checkpoints.

    Raises:
        ValueError: If ``terms`` is not a penalty or a list of penalties, or if a term's ``on`` matches no parameter (in
            ``on_fit_start``).

    Example::

        >>> from lightning_optim import L1, L2, WeightRegularization
        >>> WeightRegularization(L2(1e-4)).terms
        [L2(strength=0.0001)]
        >>> WeightRegularization([L1(1e-5, on="encoder.*"), L2(1e-4, exclude="head.*")])
        WeightRegularization{'terms': ["L1(on='encoder.*')", "L2(exclude='head.*')"]}
    """

    slot = Slot.PENALIZE
    touches = frozenset({"gradients"})

    def __init__(self, terms: Penalty | list[Penalty], name: str | None = None) -> None:
        super().__init__(name)
        self.terms = [terms] if isinstance(terms, Penalty) else terms
        if (
            not isinstance(self.terms, Sequence)
            or not self.terms
            or not all(isinstance(t, Penalty) for t in self.terms)
        ):
            raise ValueError(f"`terms={terms!r}` must be a penalty or a list of penalties, such as L2(1e-4)")
        self._labels = _labels(self.terms)
        self.reset()

    @property
    def identity(self) -> dict[str, Any]:
        return {"terms": [term.identity for term in self.terms]}

    @property
    def needs_total(self) -> bool:
        return any(term.scheduled for term in self.terms)

    def reset(self) -> None:
        self._copies = PerOptimizer(self.terms)
        self._targets: list[list[list[nn.Parameter]]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        tensors.reshard_(pl_module)
        chosen = [list(tensors.select(pl_module, term.on, term.exclude).values()) for term in self.terms]
        for term, parameters in zip(self.terms, chosen, strict=True):
            refuse_parts(term, parameters)
        for optimizer in trainer.optimizers:
            ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._targets.append([[p for p in parameters if id(p) in ours] for parameters in chosen])

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not has_gradients(optimizer):
            return
        index = trainer.optimizers.index(optimizer)
        step, total = self.steps[index], self._running.total
        logs = self.logs_now(trainer)
        for label, term, parameters in zip(self._labels, self._copies[index], self._targets[index], strict=True):
            weights: list[Tensor] = [p for p in parameters if p.requires_grad]
            if not weights:
                continue
            if logs:
                value = term.value(weights, step=step, total=total)
                self.log_value(pl_module, f"regularization/{label}", value, optimizer)
            term.add_grad_(weights, [_gradient_of(p) for p in weights], step=step, total=total)

    def extra_state(self) -> dict[str, Any]:
        return {"terms": self._copies.state_dict()}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._copies.load_state_dict(extra["terms"])


def _gradient_of(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    grad = tensors.align_grad_(parameter)
    assert grad is not None
    return grad


def _labels(terms: Sequence[Penalty]) -> list[str]:
    """A name for each term: its class, and a number from the second of a class on."""
    seen: Counter[str] = Counter()
    labels = []
    for term in terms:
        kind = type(term).__name__.lower()
        seen[kind] += 1
        labels.append(kind if seen[kind] == 1 else f"{kind}_{seen[kind]}")
    return labels
