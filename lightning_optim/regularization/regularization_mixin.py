"""Add a term to the loss that depends on the batch or the outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_optim.runtime.lightning import ModuleMixin
from lightning_optim.runtime.lightning.modules import is_attached


class RegularizationMixin(ModuleMixin):
    r"""Add a term to the loss that depends on the batch or the outputs: :math:`L = L_{task} + R(batch, outputs)`.

    A callback does not see these before the backward pass. A module overrides :meth:`regularization` and adds
    ``self.regularization_loss(batch, outputs)`` to its loss in ``training_step``. The term is part of the loss, so
    accumulation, mixed precision and the strategies treat it as such. It is logged as ``regularization/loss``. Terms on
    the weights alone, or on the outputs of single modules, need no change in the module:
    :class:`WeightRegularization` and :class:`ActivationRegularization`.

    Example::

        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> class Sparse(RegularizationMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 2)
        ...     def regularization(self, batch, outputs):
        ...         return 0.01 * outputs.abs().mean()
        ...     def training_step(self, batch, batch_idx):
        ...         outputs = self.layer(batch)
        ...         return outputs.square().mean() + self.regularization_loss(batch, outputs)
    """

    def regularization(self, batch: Any, outputs: Any) -> Tensor:
        """Return the term; to be overridden.

        Args:
            batch: The batch of ``training_step``.
            outputs: The outputs of the model, as they are passed to :meth:`regularization_loss`.

        Returns:
            A scalar, multiplied by its strength.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `regularization(self, batch, outputs)`")

    def regularization_loss(self, batch: Any, outputs: Any) -> Tensor:
        """Return :meth:`regularization`, and log it.

        Raises:
            ValueError: If it is not a scalar.
        """
        loss = self.regularization(batch, outputs)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"`regularization` must return a scalar tensor, got {got}: take its mean or sum")
        if is_attached(self):
            self.log("regularization/loss", loss.detach())
        return loss
