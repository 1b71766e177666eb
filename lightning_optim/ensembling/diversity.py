"""How far the members of an ensemble are apart, as a metric."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_optim.ensembling.mean_prediction import mutual_information, pairwise_disagreement

Measure = Literal["pairwise", "mutual_information"]
_SUM_TOLERANCE = 0.02  # of probabilities in bf16, each rounded to 1 part in 256


class Disagreement(Metric):
    r"""How far members are apart: the share of pairs that predict different labels, or the mutual information.

    ``"pairwise"``, with :math:`n_c` of M members for class ``c``, averaged over samples:

    .. math:: 1 - \sum_c \frac{n_c (n_c - 1)}{M (M - 1)}

    is the probability that two members drawn without replacement differ: 0 if all agree, 1 if no two do. No pair is
    visited: sorting the labels is enough. Divided by the error rate it tells ensembles of different accuracy apart
    (`Deep Ensembles: A Loss Landscape Perspective <https://arxiv.org/abs/1912.02757>`_).

    ``"mutual_information"`` is :math:`\frac{1}{M} \sum_i KL(p_i \,\|\, \bar p)`, averaged over samples, in nats: the
    part of the mean's entropy that comes from the members' disagreement, between 0 and ``log M``. It also sees members
    that are differently sure of one label. In this form nothing cancels where members nearly agree.

    Args:
        measure: ``"pairwise"`` or ``"mutual_information"``.
        outputs: What floating-point predictions are: ``"probabilities"`` or ``"logits"``, of which
            ``"mutual_information"`` is exact for the smallest probabilities too. It is not guessed: what is said to be
            probabilities, and does not add up to 1 over the classes, is refused. Labels need nothing, and
            ``"pairwise"`` is the same for both.
        kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is not allowed; in ``update``, for predictions of less than two members, of a wrong
            shape, labels where probabilities are needed, or scores that are no probabilities.

    ``update(predictions)`` takes the members in the first dimension: integer labels ``[M, batch, …]``, or probabilities
    or logits ``[M, batch, class, …]``. States are sums, so that processes add up; pairs are counted in integers. Values
    have no gradients.

    Example::

        >>> metric = Disagreement()
        >>> metric(torch.tensor([[0, 1, 2], [0, 1, 0], [0, 2, 1]]))
        tensor(0.5556)
        >>> metric = Disagreement("mutual_information")
        >>> metric(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor(0.6931)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    count: Tensor

    def __init__(
        self,
        measure: Measure = "pairwise",
        outputs: Literal["probabilities", "logits"] = "probabilities",
        **kwargs: Any,
    ) -> None:
        if measure not in get_args(Measure):
            raise ValueError(f"`measure` is one of {list(get_args(Measure))}, got {measure!r}")
        if outputs not in ("probabilities", "logits"):
            raise ValueError(f"`outputs` is 'probabilities' or 'logits', got {outputs!r}")
        super().__init__(**kwargs)
        self.measure, self.outputs = measure, outputs
        whole = measure == "pairwise"
        self.add_state("total", torch.tensor(0 if whole else 0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor) -> None:
        """Add a batch of predictions, the members in the first dimension."""
        predictions = predictions.detach()
        scores = predictions.is_floating_point()
        if predictions.ndim < (3 if scores else 2) or predictions.shape[0] < 2:
            raise ValueError(
                "`predictions` are labels [members, batch, …] or scores [members, batch, class, …] of at least two"
                f" members, got {predictions.dtype} of shape {list(predictions.shape)}"
            )
        if scores and predictions.shape[2] == 1:
            raise ValueError(
                f"`predictions` of shape {list(predictions.shape)} are scores of one class, on which all members agree:"
                " of binary decisions give the labels, or the scores of both classes"
            )
        if self.measure == "pairwise":
            differing, pairs = pairwise_disagreement(predictions.argmax(2) if scores else predictions)
            self.total += differing
            self.count += pairs
            return
        if not scores:
            raise ValueError('`measure="mutual_information"` needs probabilities or logits, got labels')
        wide = predictions.to(torch.float32 if predictions.device.type == "mps" else torch.float64)
        if self.outputs == "probabilities" and (((wide.sum(2) - 1).abs() > _SUM_TOLERANCE).any() or (wide < 0).any()):
            raise ValueError(
                "`predictions` are no probabilities: they do not add up to 1 over the classes, dimension 2. Set"
                ' `outputs="logits"` for what comes before a softmax; of binary decisions give both classes'
            )
        information = mutual_information(wide.log() if self.outputs == "probabilities" else wide.log_softmax(2), dim=2)
        self.total += information.sum().to(self.total.dtype)
        self.count += information.numel()

    def compute(self) -> Tensor:
        """The mean over all samples; ``nan`` before the first."""
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a value, or a list of them; see :meth:`torchmetrics.Metric.plot`. Returns figure and axes."""
        return self._plot(val, ax)
