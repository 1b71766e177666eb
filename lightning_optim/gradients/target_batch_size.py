"""Keep the batch size of an optimizer step on any number of devices, with any size of micro-batch."""

from __future__ import annotations

import math

from lightning_optim.base.arguments import check_number
from lightning_optim.base.policy import Policy


class TargetBatchSize(Policy):
    r"""Count the micro-batches that make a batch of at least ``size``: :math:`\lceil S / (b \cdot R) \rceil`.

    :math:`b` is the size of one rank's micro-batch and :math:`R` the number of ranks with different data, so that a
    recipe keeps its batch size on another number of devices.

    Args:
        size: Number S >= 1 of samples in one optimizer step, over all ranks.
        micro_batch_size: Number b >= 1 of samples in a rank's micro-batch. Default: ``batch_size`` of the training
            ``DataLoader``.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> TargetBatchSize(256).micro_batches(micro_batch_size=24, ranks=2)
        6

    For a Trainer: ``Trainer(callbacks=[GradientAccumulation(TargetBatchSize(256))])``.
    """

    used_in = "GradientAccumulation({})"
    identity_args = ()

    def __init__(self, size: int, micro_batch_size: int | None = None) -> None:
        check_number("size", size, low=1, integer=True)
        if micro_batch_size is not None:
            check_number("micro_batch_size", micro_batch_size, low=1, integer=True)
        self.size, self.micro_batch_size = size, micro_batch_size

    def micro_batches(self, micro_batch_size: int, ranks: int = 1) -> int:
        """Return the number of micro-batches in a step, >= 1."""
        return math.ceil(self.size / (micro_batch_size * ranks))
