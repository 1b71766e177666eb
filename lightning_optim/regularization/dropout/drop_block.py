"""Drop squares of feature maps: DropBlock."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_optim.base.arguments import check_number
from lightning_optim.regularization.dropout.masks import block_mask


class DropBlock(nn.Module):
    r"""Drop squares of feature maps: :math:`y = x \cdot m \cdot |m| / \sum m`, in training only.

    Neighbours in a feature map are alike, so that plain dropout removes little of what a convolution sees. Here a block
    begins at each place where it lies in the map with the probability

    .. math:: \gamma = \frac{p}{b^2} \cdot \frac{H W}{(H - b + 1)(W - b + 1)},

    and :math:`m` is 0 in the blocks and 1 elsewhere; each sample and channel has its own blocks. The share of zeros is
    near p, and smaller where blocks overlap. What is kept is scaled by one number for the whole batch. Paper: Ghiasi
    et al., *DropBlock: A regularization method for convolutional networks*, `arXiv:1810.12890
    <https://arxiv.org/abs/1810.12890>`_, in which a fixed p worked less well than one that grows from 0, as
    :class:`ScheduledDropout` sets it.

    Args:
        drop_prob: The share p in [0, 1] of a map that is dropped; 1 drops all. Default 0, to be set by a schedule.
        block_size: Side b of a block, an integer >= 1; 1 is plain dropout. It is cut to the size of the map. Default 7,
            as in the paper, for maps of 14 × 14 and more.

    Shape:
        ``[N, C, H, W]`` to the same.

    Raises:
        ValueError: If an argument is out of its range; when called in training, if the input has not four dimensions.

    Example::

        >>> drop = DropBlock(0.2, block_size=3)
        >>> y = drop(torch.ones(8, 4, 16, 16))
        >>> len(set(y.flatten().tolist())), round(y.mean().item(), 4)
        (2, 1.0)
        >>> callback = ScheduledDropout({"*": Linear(0.0, 0.1)})  # sets `drop_prob`, for Trainer(callbacks=[callback])
    """

    def __init__(self, drop_prob: float = 0.0, block_size: int = 7) -> None:
        super().__init__()
        check_number("drop_prob", drop_prob, low=0.0, high=1.0)
        check_number("block_size", block_size, low=1, integer=True)
        self.drop_prob, self.block_size = drop_prob, block_size

    def forward(self, x: Tensor) -> Tensor:
        """Drop blocks."""
        return x if not self.training or self.drop_prob == 0.0 else self.drop(self.drop_prob, x)

    def drop(self, rate: float | Tensor, x: Tensor) -> Tensor:
        """Drop blocks at a rate that is a number or a tensor without dimensions."""
        if x.ndim != 4:
            raise ValueError(f"DropBlock takes feature maps of the shape [N, C, H, W], got {list(x.shape)}")
        return x * block_mask(x, rate, self.block_size)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, block_size={self.block_size}"
