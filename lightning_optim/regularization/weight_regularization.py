"""Add the gradients of penalties before each optimizer step, decay weights in it, and project them after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.base import shards, sparse
from lightning_optim.base.arguments import check_number
from lightning_optim.base.norms import nonzero_counts
from lightning_optim.base.policy import PerOptimizer, belongs_to
from lightning_optim.base.selection import Selection, select
from lightning_optim.plotting import nothing_to_plot
from lightning_optim.regularization.penalties.penalty import Penalty, add_grads_
from lightning_optim.regularization.projections.proximal import Proximal
from lightning_optim.regularization.projections.weight_decay import WeightDecay
from lightning_optim.regularization.sparsity_table import Sparsity
from lightning_optim.regularization.term_history import ZEROS, TermHistory, draw
from lightning_optim.regularization.term_names import names_beside
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import LightningModule, Trainer, rank_zero_warn
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.ran_elsewhere import check_no_copy_ran
from lightning_optim.runtime.refusals import refuse_complex, refuse_looked_up_rows, refuse_split_units
from lightning_optim.runtime.run_summary import tensors
from lightning_optim.runtime.step import OptimizerStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Term: TypeAlias = Penalty | Proximal | WeightDecay

_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)


class WeightRegularization(OptimCallback):
    r"""Add penalties on the weights to the loss, :math:`g \leftarrow g + \nabla_w \sum_i P_i(w)`, or project them.

    A :class:`Penalty` adds its gradient in closed form once per optimizer step, before clipping, when gradients are
    whole, averaged over ranks and unscaled: no autograd graph, and no factor for accumulation or a loss scale. The
    logged training loss stays that of the task. The values of the penalties are logged as ``regularization/l1``,
    ``regularization/l2``, …, each in the unit of the loss. :class:`WeightDecay` and :class:`Proximal` terms act on the
    weights: a decay just before a step that is taken or, if it is cautious, after it, and then the projections, before
    weights are averaged. For terms that make weights exactly zero, the shares of zeros are logged as
    ``regularization/zeros`` and ``regularization/zeros/<parameter>``.

    A term acts on the trainable parameters of the optimizer that steps. A penalty creates the gradient of a parameter
    that has none, except if no parameter has one: then the step was cancelled. Where a gradient is sparse
    (``Embedding(sparse=True)``), a penalty acts on the rows that have a gradient, and so on a row as often as it is
    looked up; the logged value is the penalty of all rows. A penalty that is computed on whole matrices raises an
    error.

    Args:
        terms: One term, or a list of terms: penalties are added, decays and projections act in turn. Each term chooses
            its own parameters, by default those with two dimensions or more.
        name: Distinguishes two callbacks with the same terms in checkpoints.
        summary: See :class:`OptimCallback`.

    Raises:
        ValueError: If ``terms`` is not a term or a list of terms, or if a term's ``on`` matches no parameter (in
            ``on_fit_start``).
        MisconfigurationException: If a term has no meaning for complex weights or cannot be computed on shards (in
            ``on_fit_start``), or if it needs whole matrices and a gradient is sparse (before the first step).

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

    def __init__(self, terms: Term | list[Term], name: str | None = None, summary: bool = True) -> None:
        super().__init__(name, summary)
        self.terms = list(terms) if isinstance(terms, list | tuple) else [terms]
        if not self.terms or not all(isinstance(term, Term) for term in self.terms):
            raise ValueError(
                f"`terms` must be a penalty, a projection, WeightDecay or a list of them, such as L2(1e-4), got"
                f" {terms!r}{belongs_to(terms, (Penalty, Proximal, WeightDecay))}"
            )
        for term in self.terms:
            term.check_complete()
        self.reset()

    @property
    def identity(self) -> dict[str, Any]:
        return {"terms": [term.identity for term in self.terms]}

    @property
    def needs_total(self) -> bool:
        return any(term.scheduled for term in self.terms)

    def reset(self) -> None:
        self._names: list[str] = []
        self._copies = PerOptimizer(self.terms)
        self._selections: list[Selection] = []
        self._looked_up: set[int] = set()
        self._largest: dict[int, list[float]] = {}  # learning rate of each parameter group, by the optimizer's index
        self._values: dict[str, Tensor] = {}  # of the penalties in the step that is under way
        self._to_log: dict[int, dict[str, Tensor]] = {}  # shares of zeros by optimizer, until Lightning takes values
        self._histories: list[TermHistory] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._names = names_beside(self, WeightRegularization, trainer.callbacks)
        shards.reshard_(pl_module)
        self._copies.name_weights(pl_module)
        for term in self.terms:
            chosen = select(pl_module, term.on, term.exclude)
            refuse_complex(term, chosen)
            refuse_split_units(term, chosen.values())
            self._selections.append(Selection(pl_module, term.on, term.exclude))
        for index in range(len(trainer.optimizers)):
            self._copies[index]  # made now, so that what does not fit the module raises its error before any step
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
                if isinstance(term, Proximal) or not term.decays:
                    continue
                found = [(len(_trainable(group["params"], selection)), group["weight_decay"]) for group in decayed]
                if count := sum(count for count, _ in found):
                    name, decay = type(optimizer).__name__, next(decay for count, decay in found if count)
                    rank_zero_warn(
                        f"{name}(weight_decay={decay}) shrinks {tensors(count)} that {term.brief} shrinks too: pass"
                        f" `weight_decay=0.0` to {name}, or leave the term out."
                    )
                    return

    def describe_step(self, index: int) -> tuple[str, str]:
        parameters = [p for group in self.session.trainer.optimizers[index].param_groups for p in group["params"]]
        before: list[str] = []
        after: list[str] = []
        for term, selection in zip(self.terms, self._selections, strict=True):
            if count := len(_trainable(parameters, selection)):
                (after if isinstance(term, Proximal) else before).append(f"{term.in_words} on {tensors(count)}")
        return " → ".join(before), " → ".join(after)

    # ---- in a step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        if step.dropped:
            return
        self._values = {}  # those of a step that the scaler skipped are in no history
        when: dict[str, Any] = {"step": step.number, "total": step.total}
        alike: dict[tuple[int, ...], tuple[list[Penalty], list[Tensor]]] = {}  # penalties on the same weights
        for name, term, selection in zip(self._names, self._copies[step.index], self._selections, strict=True):
            if selection.follow(step.parameters):
                self._looked_up = _looked_up(pl_module)
            weights = _trainable(step.parameters, selection)
            if not weights or not isinstance(term, Penalty):
                continue
            if step.logs:
                value = self._values[f"regularization/{name}"] = term.value(weights, **when)
                self.log_value(pl_module, f"regularization/{name}", value, optimizer)
            alike.setdefault(tuple(map(id, weights)), ([], weights))[0].append(term)
        for penalties, penalized in alike.values():
            weights = [p for p in penalized if p.grad is not None or id(p) not in self._looked_up]
            rows, grads = sparse.dense_rows(weights, _gradients_of(weights))
            for term in penalties:
                refuse_looked_up_rows(term, weights, rows)
            add_grads_(penalties, rows, grads, **when)

    def on_before_weight_update(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        terms = zip(self._copies[step.index], self._selections, strict=True)
        # What another term takes from a weight is no move of the optimizer: cautious ones come last.
        for term, selection in sorted(terms, key=lambda one: getattr(one[0], "cautious", False)):
            if isinstance(term, WeightDecay):
                rates = zip(step.groups, step.lr, self._largest_rates(step), strict=True)
                for group, lr, max_lr in rates:
                    weights = [weight for weight in _trainable(group, selection) if weight.grad is not None]
                    term.before_step_(weights, lr=lr, max_lr=max_lr, step=step.number, total=step.total)

    def _largest_rates(self, step: OptimizerStep) -> list[float]:
        """Return the largest learning rate of the run for each parameter group, as far as it is known.

        A rate that a user raises by hand, as in a warm-up, is the largest one as soon as it is above all before.
        """
        before = self._largest.get(step.index, [])
        before = before + [0.0] * (len(step.lr) - len(before))
        known = [group.get("max_lr") or group.get("initial_lr") or 0.0 for group in step.optimizer.param_groups]
        rates = [max(float(most), last, lr) for most, last, lr in zip(known, before, step.lr, strict=True)]
        self._largest[step.index] = rates
        return rates

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        terms = list(zip(self._copies[step.index], self._selections, strict=True))
        for term, _ in terms:
            if isinstance(term, WeightDecay):
                term.after_step_()
        for term, selection in terms:
            if isinstance(term, Proximal):
                for group, lr in zip(step.groups, step.lr, strict=True):
                    term.project_(_trainable(group, selection), lr=lr, step=step.number, total=step.total)
        if step.logs:
            self._measure(step)

    def _measure(self, step: OptimizerStep) -> None:
        """Keep the values of this step for the log and the plot."""
        zeros = self._shares_of_zeros(step)
        values, self._values = self._values | zeros, {}
        if values:
            self._to_log[step.index] = zeros
            self._history_of(step.index).append(self.steps[step.index], values)

    def _shares_of_zeros(self, step: OptimizerStep) -> dict[str, Tensor]:
        """Return the share of exact zeros of each weight on which a term makes some, and of all together."""
        terms = zip(self.terms, self._selections, strict=True)
        ids = {key for term, selection in terms if _makes_zeros(term) for key in selection.existing}
        if not ids:
            return {}
        found = {
            name: weight
            for name, weight in zip(step.parameter_names, step.parameters, strict=True)
            if id(weight) in ids and weight.requires_grad and weight.numel()
        }
        if not found:
            return {}
        sizes = [weight.numel() for weight in found.values()]
        counts = nonzero_counts([weight.detach() for weight in found.values()]).to(torch.float32)
        shares = {f"{ZEROS}/{name}": 1.0 - n / size for name, n, size in zip(found, counts, sizes, strict=True)}
        return {ZEROS: 1.0 - counts.sum() / sum(sizes), **shares}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for index, values in self._to_log.items():
            for name, value in values.items():
                self.log_value(pl_module, name, value, trainer.optimizers[index])
        self._to_log = {}

    # ---- reading -----------------------------------------------------------------------------------------------------

    def report(self) -> str:
        making = [term for term in self.terms if _makes_zeros(term)]
        if not making:
            return ""
        module = self.session.trainer.lightning_module
        names = {name for term in making for name in select(module, term.on, term.exclude, required=False)}
        weights = {name: weight for name, weight in select(module, "*").items() if name in names}
        if shards.any_sharded(weights.values()):
            return ""  # to count those of other ranks is a collective, and this is called on one rank
        return Sparsity.of(weights).in_words

    def plot(self, metric_or_optimizer: str | int | None = None, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the values of the penalties over the logged steps, and the share of zeros of each layer.

        Shares are drawn for terms that make weights exactly zero. The last 1000 logged steps are kept.

        Args:
            metric_or_optimizer: ``"penalties"`` or ``"zeros"`` to draw one of the two; or the index of the optimizer.
                Default: both, of the first optimizer.
            ax: The axes to draw on, which get the penalties if there are any. Default: those of a new figure, with a
                panel for each of the two.

        Returns:
            The figure and its last axes.

        Raises:
            ValueError: If ``metric_or_optimizer`` is none of these.
            RuntimeError: If no step was logged yet, or if no term logs a value, as with ``MaxNorm`` alone.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        kind = metric_or_optimizer if isinstance(metric_or_optimizer, str) else None
        index = 0 if isinstance(metric_or_optimizer, str | None) else metric_or_optimizer
        check_number("metric_or_optimizer", index, low=0, high=max(0, len(self._histories) - 1), integer=True)
        if not self._histories:
            check_no_copy_ran(self)
            if not any(isinstance(term, Penalty) or _makes_zeros(term) for term in self.terms):
                raise RuntimeError(
                    f"{self} has nothing to plot: only penalties, and terms that make zeros, log a value"
                )
            raise nothing_to_plot("train more steps than `Trainer(log_every_n_steps=…)`.")
        of = f" of optimizer {index}" if len(self._histories) > 1 else ""
        return draw(self._histories[index], kind, ax, of)

    def _history_of(self, index: int) -> TermHistory:
        self._histories += [TermHistory() for _ in range(index + 1 - len(self._histories))]
        return self._histories[index]

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return {
            "terms": self._copies.state_dict(),
            "largest_rates": dict(self._largest),
            "histories": [history.state_dict() for history in self._histories],
        }

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._copies.load_state_dict(extra["terms"])
        self._largest = dict(extra.get("largest_rates", {}))  # not in earlier versions, nor is the next one
        self._histories = [TermHistory.loaded(saved) for saved in extra.get("histories", [])]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_selections": [], "_looked_up": set(), "_values": {}, "_to_log": {}}


def _makes_zeros(term: Term) -> bool:
    return isinstance(term, Proximal) and term.makes_zeros


def _looked_up(module: nn.Module) -> set[int]:
    """Return the ``id`` of each weight with a sparse gradient: without a gradient, none of its rows was looked up."""
    return {id(m.weight) for m in module.modules() if isinstance(m, _LOOKED_UP) and m.sparse}


def _trainable(parameters: Sequence[Tensor], selection: Selection) -> list[Tensor]:
    ids = selection.existing
    return [p for p in parameters if id(p) in ids and p.requires_grad]


def _gradients_of(weights: list[Tensor]) -> list[Tensor]:
    """Return the gradient of each weight, in the weight's placement; one is made where there is none."""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    grads: list[Any] = [weight.grad for weight in weights]
    if sparse.any_sparse(grads) or shards.any_sharded(grads):
        grads = [shards.align_grad_(weight) for weight in weights]
    return grads
