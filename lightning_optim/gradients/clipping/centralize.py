"""Subtraction of the mean of each row of the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.base import module_tensors, shards
from lightning_optim.base.norms import row_dims, row_sums
from lightning_optim.gradients.clipping.clipping_policy import Clipping


class Centralize(Clipping):
    r"""Subtract from each row of the gradient its mean: :math:`G_i \leftarrow G_i - \mathrm{mean}(G_i)`.

    Gradient centralization (Yong et al., *Gradient Centralization: A New Optimization Technique for Deep Neural
    Networks*, `arXiv:2004.01461 <https://arxiv.org/abs/2004.01461>`_): the mean of the weights of one output stays what
    it was. It acts on tensors with two dimensions or more, and leaves vectors alone. Leave embeddings out with
    ``exclude=torch.nn.Embedding``: their rows are looked up, and not summed over.

    Exact on shards: the sums of rows that are cut are taken over the ranks that hold the parts.

    Args:
        on: The parameters on whose gradients it acts: a glob over names, a module class, a predicate, or a list of
            these. Default: all with two dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    Example::

        >>> grad = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
        >>> Centralize().clip_([grad])
        >>> grad
        tensor([[-1.,  1.],
                [ 0.,  0.]])

    For a Trainer: ``Trainer(callbacks=[GradientClipping([Centralize(), ClipByNorm(1.0)])])``.
    """

    limits: ClassVar[bool] = False

    def _clip_(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        pairs = zip(grads, weights or grads, strict=True)
        chosen = [(grad, weight) for grad, weight in pairs if module_tensors.dimensions(weight) >= 2]
        if chosen:
            matrices, like = [grad for grad, _ in chosen], [weight for _, weight in chosen]
            means = row_sums(matrices, like)
            sizes = [math.prod(weight.shape[dim] for dim in row_dims(weight)) for weight in like]
            torch._foreach_div_(means, sizes)
            torch._foreach_sub_(shards.local_shards(matrices), means)
