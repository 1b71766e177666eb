"""Set negative weights to zero after the optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.base import shards
from lightning_optim.regularization.projections.proximal import Proximal


class NonNegative(Proximal):
    r"""Set each negative weight to exactly zero: :math:`w \leftarrow \max(w, 0)`.

    So an output never falls when an input rises, as in monotonic networks, and inputs can only add up, as in
    non-negative matrix factorization (Lee and Seung, *Learning the Parts of Objects by Non-negative Matrix
    Factorization*, `doi:10.1038/44565 <https://doi.org/10.1038/44565>`_). The learning rate does not enter. An output
    whose weights are all negative at the start becomes zero at the first step; initialize such a layer with absolute
    values.

    Args:
        on: The parameters that are projected: a glob over names, a module class, a predicate, or a list of these.
            Default: those with two dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        MisconfigurationException: If a parameter is complex: there is no order among complex numbers (in
            ``on_fit_start`` of the callback).

    Example::

        >>> weight = torch.tensor([[0.5, -0.5]])
        >>> NonNegative().project_([weight], lr=0.1)
        >>> weight
        tensor([[0.5000, 0.0000]])
        >>> callback = WeightRegularization(NonNegative(on="head.weight"))  # for Trainer(callbacks=[callback])
    """

    makes_zeros = True
    needs_real = True

    def _project_(self, weights: Sequence[Tensor], lr: float) -> None:
        torch._foreach_clamp_min_(shards.local_shards(weights), 0.0)
