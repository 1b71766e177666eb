"""Drop residual branches of random samples: stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_optim.base.arguments import check_number
from lightning_optim.regularization.dropout.masks import leading, mask


class DropPath(nn.Module):
    r"""Drop the residual branch of random samples: :math:`y = x \cdot m / (1 - p)`, :math:`m \sim B(1 - p)`.

    Stochastic depth (Huang et al., *Deep Networks with Stochastic Depth*, `arXiv:1603.09382
    <https://arxiv.org/abs/1603.09382>`_): one draw for each sample of the batch, in training only. Put it on the
    residual branch, ``x + DropPath(p)(f(x))``; the rate usually grows from 0 at the first block to p at the last.

    Args:
        drop_prob: Probability p in [0, 1] that a sample's branch is dropped. Named as in timm, whose modules
            :class:`ScheduledDropout` sets too.

    Shape:
        ``[B, ...]`` to the same.

    Raises:
        ValueError: If ``drop_prob`` is not a number in [0, 1].

    Example::

        >>> branch = DropPath(0.5)
        >>> kept = branch(torch.ones(1000, 1))
        >>> sorted(set(kept.flatten().tolist()))
        [0.0, 2.0]
        >>> branch.eval()(torch.ones(2, 1)).flatten()
        tensor([1., 1.])
        >>> callback = ScheduledDropout({"*": Linear(0.0, 0.2)})  # sets `drop_prob`, for Trainer(callbacks=[callback])
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        check_number("drop_prob", drop_prob, low=0.0, high=1.0)
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples."""
        return x if not self.training or self.drop_prob == 0.0 else self.drop(self.drop_prob, x)

    def drop(self, rate: float | Tensor, x: Tensor) -> Tensor:
        """Drop samples at a rate that is a number or a tensor without dimensions."""
        return x * mask(leading(x, 1), rate)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"
