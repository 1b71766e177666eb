"""Prepare sparse gradients for formulas that are written for dense tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from torch import Tensor


def any_sparse(tensors: Iterable[Tensor]) -> bool:
    """Return True if any gradient is sparse, such as that of ``Embedding(sparse=True)``."""
    return True in map(operator.attrgetter("is_sparse"), tensors)


def dense_rows(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and gradients for formulas on dense tensors: a sparse gradient is replaced by its values.

    Args:
        weights: The parameters.
        grads: Their gradients, in the same order; a sparse one is coalesced, as by
            :func:`~lightning_optim.gradients_of`.

    Returns:
        The same tensors, except that a sparse gradient is replaced by its values, in live storage, and its weight by a
        copy of the rows that have a gradient.
    """
    if not any_sparse(grads):
        return list(weights), list(grads)
    pairs = zip(weights, grads, strict=True)
    rows = [weight.detach()[tuple(grad.indices())] if grad.is_sparse else weight for weight, grad in pairs]
    return rows, [grad.values() if grad.is_sparse else grad for grad in grads]
