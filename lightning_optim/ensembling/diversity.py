"""Measure how much the predictions of an ensemble's members differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_optim.base.arguments import check_choice
from lightning_optim.base.dtypes import widest_dtype
from lightning_optim.ensembling.mean_prediction import log_mean_exp
from lightning_optim.ensembling.probability_check import why_no_probabilities
from lightning_optim.runtime.lightning.metrics import plot

Measure = Literal["pairwise", "mutual_information"]
Scores = Literal["probabilities", "logits"]


class Disagreement(Metric):
    r"""Measure how much members disagree: the share of pairs with different labels, or the mutual information.

    ``"pairwise"`` is, for :math:`M` members of which :math:`n_c` predict class ``c``, averaged over samples,

    .. math:: 1 - \sum_c \frac{n_c (n_c - 1)}{M (M - 1)},

    the probability that two different members predict different labels: 0 if all agree, 1 if no two do. The cost is one
    sort over the members, not one comparison per pair. Divide it by the error rate to compare ensembles of different
    accuracy (`Deep Ensembles: A Loss Landscape Perspective <https://arxiv.org/abs/1912.02757>`_).

    ``"mutual_information"`` is :math:`\frac{1}{M} \sum_i KL(p_i \,\|\, \bar p)`, averaged over samples: the part of the
    entropy of the mean prediction that comes from disagreement, between 0 and ``log M``, in nats. It also measures how
    differently confident members are that predict the same label.

    Pass the members' predictions to ``update(predictions)``: a list with the tensor of each member, or one tensor with
    the members in the first dimension. They are integer labels ``[M, batch, …]``, or probabilities or logits
    ``[M, batch, class, …]``. The states are sums, so processes add up. The value has no gradient.

    Args:
        measure: ``"pairwise"`` or ``"mutual_information"``.
        outputs: Kind of floating-point predictions: ``"probabilities"`` or ``"logits"``. Prefer logits for
            ``"mutual_information"``, which is then exact for the smallest probabilities too. It makes no difference for
            labels and for ``"pairwise"``.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is not allowed; in ``update``, if there are fewer than two members, the shape is
            wrong, labels come where probabilities are needed, or "probabilities" do not add up to 1 over the classes.

    Example::

        >>> metric = Disagreement()
        >>> metric(torch.tensor([[0, 1, 2], [0, 1, 0], [0, 2, 1]]))
        tensor(0.5556)
        >>> metric = Disagreement("mutual_information")
        >>> metric(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor(0.6931)

    In the ``test_step`` of a module, where Lightning computes and resets it::

        self.disagreement.update(self.member_outputs(x))  # `self` is an Ensemble there
        self.log("disagreement", self.disagreement)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    count: Tensor

    def __init__(self, measure: Measure = "pairwise", outputs: Scores = "probabilities", **kwargs: Any) -> None:
        check_choice("measure", measure, Measure)
        check_choice("outputs", outputs, Scores)
        super().__init__(**kwargs)
        self.measure, self.outputs = measure, outputs
        counts_pairs = measure == "pairwise"
        self.add_state("total", torch.tensor(0 if counts_pairs else 0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor | Sequence[Tensor]) -> None:
        """Add a batch of predictions: a tensor with the members in the first dimension, or a list of one for each."""
        predictions = _stacked(predictions).detach()
        scores = predictions.is_floating_point()
        if predictions.ndim < (3 if scores else 2) or predictions.shape[0] < 2:
            raise ValueError(
                "`predictions` must be labels [members, batch, …] or scores [members, batch, class, …] of at least two"
                f" members, got {predictions.dtype} of shape {list(predictions.shape)}"
            )
        if scores and predictions.shape[2] == 1:
            raise ValueError(
                f"`predictions` of shape {list(predictions.shape)} are scores of one class, on which all members agree:"
                " for binary decisions pass the labels, or the scores of both classes"
            )
        if self.measure == "pairwise":
            differing, pairs = pairwise_disagreement(predictions.argmax(2) if scores else predictions)
            self.total += differing
            self.count += pairs
            return
        if not scores:
            raise ValueError('`measure="mutual_information"` needs probabilities or logits, got labels')
        wide = predictions.to(widest_dtype(predictions.device))
        if self.outputs == "probabilities":
            if why := why_no_probabilities(wide, dim=2):
                raise ValueError(
                    f'`predictions` are no probabilities: they {why}. Set `outputs="logits"` for values before the'
                    " softmax; for binary decisions pass both classes"
                )
            wide = wide.clamp_min(0.0).log()
        information = mutual_information(wide if self.outputs == "probabilities" else wide.log_softmax(2), dim=2)
        self.total += information.sum().to(self.total.dtype)
        self.count += information.numel()

    def compute(self) -> Tensor:
        """Return the mean over all samples; ``nan`` before the first."""
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a value, or a list of values, and return the figure and axes; see :meth:`torchmetrics.Metric.plot`."""
        return plot(self, val, ax)


def _stacked(predictions: Any) -> Tensor:
    """Return the members' predictions as one tensor."""
    if isinstance(predictions, Tensor):
        return predictions
    given = list(predictions) if isinstance(predictions, list | tuple) else []
    if not given or not all(isinstance(one, Tensor) for one in given) or len({one.shape for one in given}) > 1:
        kinds = [list(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in given]
        got = f"a {type(predictions).__name__}" + (f" of {', '.join(map(str, kinds))}" if given else "")
        raise ValueError(
            "`predictions` must be a tensor with the members in the first dimension, or a list with one tensor of the"
            f" same shape for each member, as of `ensemble.member_outputs(x)`; got {got}"
        )
    return torch.stack(given)


def pairwise_disagreement(labels: Tensor) -> tuple[Tensor, Tensor]:
    r"""Count the ordered pairs of members that disagree, summed over all positions; return that count and all pairs.

    :math:`M(M-1) - \sum_c n_c (n_c - 1)` at a position where :math:`n_c` members predict ``c``. No pair is visited, and
    the number of classes need not be known: after sorting, the k-th label of a run agrees with the k - 1 before it.

    Args:
        labels: Integers of shape ``[M, …]`` for at least two members.

    Example::

        >>> pairwise_disagreement(torch.tensor([[0, 7], [0, 8], [1, 9]]))
        (tensor(10), tensor(12))
    """
    members = labels.shape[0]
    ordered = labels.sort(dim=0).values
    position = torch.arange(members, device=labels.device).view(-1, *[1] * (labels.ndim - 1))
    starts_run = torch.ones_like(ordered, dtype=torch.bool)
    starts_run[1:] = ordered[1:] != ordered[:-1]
    run_start = torch.where(starts_run, position, 0).cummax(dim=0).values
    agreeing = 2 * (position - run_start).sum()
    pairs = torch.tensor(members * (members - 1) * labels[0].numel(), device=labels.device)
    return pairs - agreeing, pairs


def mutual_information(log_probabilities: Tensor, dim: int = -1) -> Tensor:
    r"""Return the part of the mean's entropy that comes from disagreement: :math:`\frac{1}{M}\sum_i KL(p_i\|\bar p)`.

    It equals :math:`H(\bar p) - \frac{1}{M} \sum_i H(p_i)`, the total minus the aleatoric uncertainty, and lies in
    ``[0, log M]``. The difference of two entropies cancels where members nearly agree; this form does not.

    Args:
        log_probabilities: Log-probabilities of shape ``[M, …]``. They are converted to fp64 (fp32 on a device without
            it).
        dim: The dimension of the classes.

    Returns:
        One value of at least zero for each position, in nats.

    Example::

        >>> mutual_information(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log()).exp()
        tensor([2.], dtype=torch.float64)
    """
    wide = log_probabilities.to(widest_dtype(log_probabilities.device))
    difference = wide - log_mean_exp(wide)
    # A class of probability zero contributes nothing; 0 times infinity would be nan.
    terms = torch.where(wide == -math.inf, 0.0, wide.exp() * difference)
    return terms.sum(dim).mean(0).clamp_min(0.0)
