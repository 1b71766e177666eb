"""Add the gradients of penalties before each optimizer step, and apply proximal steps after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.base import shards, sparse
from lightning_optim.base.policy import PerOptimizer, belongs_to
from lightning_optim.base.selection import Selection, select
from lightning_optim.regularization.penalties import Penalty
from lightning_optim.regularization.proximal import Proximal
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import LightningModule, Trainer, rank_zero_warn
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.refusals import refuse_looked_up_rows, refuse_split_units
from lightning_optim.runtime.run_summary import tensors

_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)


class WeightRegularization(OptimCallback):
    r"""Add penalties on the weights to the loss, :math:`g \leftarrow g + \nabla_w \sum_i P_i(w)`, or project them.

    A :class:`Penalty` adds its gradient in closed form once per optimizer step, before clipping, when gradients are
    whole, averaged over ranks and unscaled: no autograd graph, and no factor for accumulation or a loss scale. The
    logged training loss stays that of the task. The values of the penalties are logged as ``regularization/l1``,
    ``regularization/l2``, …, each in the unit of the loss. A :class:`Proximal` term acts on the weights after each step
    that happened, before they are averaged.

    A term acts on the trainable parameters of the optimizer that steps. A penalty creates the gradient of a parameter
    that has none, except if no parameter has one: then the step was cancelled. Where a gradient is sparse
    (``Embedding(sparse=True)``), a penalty acts on the rows that have a gradient, and so on a row as often as it is
    looked up; the logged value is the penalty of all rows. A penalty that is computed on whole matrices raises an
    error.

    Args:
        terms: One term, or a list of terms: penalties are added, proximal terms act in turn. Each term chooses its own
            parameters, by default those with two dimensions or more.
        name: Distinguishes two callbacks with the same terms in checkpoints.
        summary: See :class:`OptimCallback`.

    Raises:
        ValueError: If ``terms`` is not a term or a list of terms, or if a term's ``on`` matches no parameter (in
            ``on_fit_start``).

    Example::

        >>> from lightning_optim import L1, L2, WeightRegularization
        >>> WeightRegularization(L2(1e-4)).terms
        [L2(0.0001)]
        >>> WeightRegularization([L1(1e-5, on="encoder.*.weight"), L2(1e-4, exclude="head.*")])
        WeightRegularization([L1(1e-05, on='encoder.*.weight'), L2(0.0001, exclude='head.*')])

    For a Trainer: ``Trainer(callbacks=[WeightRegularization(L2(1e-4))])``.
    """

    slot = Slot.PENALIZE
    touches = frozenset({"gradients", "weights"})

    def __init__(
        self, terms: Penalty | Proximal | list[Penalty | Proximal], name: str | None = None, summary: bool = True
    ) -> None:
        super().__init__(name, summary)
        self.terms = list(terms) if isinstance(terms, list | tuple) else [terms]
        if not self.terms or not all(isinstance(term, Penalty | Proximal) for term in self.terms):
            raise ValueError(
                f"`terms` must be a penalty, a proximal term or a list of them, such as L2(1e-4), got {terms!r}"
                + belongs_to(terms, (Penalty, Proximal))
            )
        for term in self.terms:
            term.check_complete()
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
        self._selections: list[Selection] = []
        self._looked_up: set[int] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        shards.reshard_(pl_module)
        self._copies.name_weights(pl_module)
        for term in self.terms:
            refuse_split_units(term, select(pl_module, term.on, term.exclude).values())
            self._selections.append(Selection(pl_module, term.on, term.exclude))
        self._looked_up = _looked_up(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not trainer.fast_dev_run:
            self._warn_of_second_decay(trainer)

    def _warn_of_second_decay(self, trainer: Trainer) -> None:
        """Warn once if an optimizer decays weights that an L2 penalty shrinks too."""
        for optimizer in trainer.optimizers:
            decayed = [group for group in optimizer.param_groups if group.get("weight_decay")]
            for term, selection in zip(self.terms, self._selections, strict=True):
                if not (isinstance(term, Penalty) and term.decays):
                    continue
                found = [(len(_trainable(group["params"], selection)), group["weight_decay"]) for group in decayed]
                if count := sum(count for count, _ in found):
                    name, decay = type(optimizer).__name__, next(decay for count, decay in found if count)
                    rank_zero_warn(
                        f"{name}(weight_decay={decay}) shrinks {tensors(count)} that {term.brief} shrinks too: pass"
                        f" `weight_decay=0.0` to {name}, or leave the penalty out."
                    )
                    return

    def describe_step(self, index: int) -> tuple[str, str]:
        parameters = [p for group in self.session.trainer.optimizers[index].param_groups for p in group["params"]]
        before: list[str] = []
        after: list[str] = []
        for term, selection in zip(self.terms, self._selections, strict=True):
            if count := len(_trainable(parameters, selection)):
                (before if isinstance(term, Penalty) else after).append(f"{term.in_words} on {tensors(count)}")
        return " → ".join(before), " → ".join(after)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        if step.dropped:
            return
        when: dict[str, Any] = {"step": step.number, "total": step.total}
        for label, term, selection in zip(self._labels, self._copies[step.index], self._selections, strict=True):
            if selection.follow(step.parameters):
                self._looked_up = _looked_up(pl_module)
            weights = _trainable(step.parameters, selection)
            if not weights or not isinstance(term, Penalty):
                continue
            if step.logs:
                value = term.value(weights, **when)
                self.log_value(pl_module, f"regularization/{label}", value, optimizer)
            weights = [p for p in weights if p.grad is not None or id(p) not in self._looked_up]
            rows, grads = sparse.dense_rows(weights, [_gradient_of(p) for p in weights])
            refuse_looked_up_rows(term, weights, rows)
            term.add_grad_(rows, grads, **when)

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        for term, selection in zip(self._copies[step.index], self._selections, strict=True):
            if isinstance(term, Proximal):
                for group, lr in zip(step.groups, step.lr, strict=True):
                    term.project_(_trainable(group, selection), lr=lr, step=step.number, total=step.total)

    def extra_state(self) -> dict[str, Any]:
        return {"terms": self._copies.state_dict()}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._copies.load_state_dict(extra["terms"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_selections": [], "_looked_up": set()}


def _looked_up(module: nn.Module) -> set[int]:
    """Return the ``id`` of each weight with a sparse gradient: without a gradient, none of its rows was looked up."""
    return {id(m.weight) for m in module.modules() if isinstance(m, _LOOKED_UP) and m.sparse}


def _trainable(parameters: Sequence[Tensor], selection: Selection) -> list[Tensor]:
    ids = selection.existing
    return [p for p in parameters if id(p) in ids and p.requires_grad]


def _gradient_of(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    grad = shards.align_grad_(parameter)
    assert grad is not None
    return grad


def _labels(terms: Sequence[Penalty | Proximal]) -> list[str]:
    """Return the name of each term for the log: its class, with a number from the second term of a class on."""
    seen: Counter[str] = Counter()
    labels = []
    for term in terms:
        kind = type(term).__name__.lower()
        seen[kind] += 1
        labels.append(kind if seen[kind] == 1 else f"{kind}_{seen[kind]}")
    return labels
