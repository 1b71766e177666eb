"""Keep the training loss from falling below a level, by a hook on the loss tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_optim.base.arguments import check_number
from lightning_optim.base.construction import written
from lightning_optim.base.dtypes import accumulation_dtype
from lightning_optim.base.policy import is_scheduled
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import LightningModule, Trainer, rank_zero_warn
from lightning_optim.runtime.refusals import refuse_line_search


class Flooding(OptimCallback):
    r"""Minimize :math:`|J - b| + b` in place of the loss :math:`J`, so that the training loss stays near a level.

    Above the level :math:`b` training goes on as usual; below it the gradient has the opposite sign, and the loss rises
    again. The weights then move about among those with a training loss of about :math:`b`, and mostly end where the
    loss is flat. It needs no change in the model: a hook on the loss tensor multiplies its gradient by
    :math:`\mathrm{sign}(J - b)`, which is 0 for :math:`J = b`.

    :math:`J` is the loss of one micro-batch on one rank, as the module computed it: before it is divided by the size of
    the window or multiplied by a loss scale. So with accumulation or several ranks each micro-batch is compared with
    the level, and not their mean. The logged loss stays :math:`J`. If it is NaN, so are the gradients. Under manual
    optimization each loss that is passed to ``manual_backward`` or ``optimize`` is compared with the level.

    Warns once, at the end of the first epoch, if every loss in it was below the level.

    Paper: Ishida et al., `Do We Need Zero Training Loss After Achieving Zero Training Error?
    <https://arxiv.org/abs/2002.08709>`_.

    Args:
        level: The level :math:`b`, in the unit of the loss: a finite number, or a schedule of them. With
            cross-entropy try 0.01 to 0.1. It must be above the smallest loss that the model can reach, or it does
            nothing; above the loss at the start, nothing is learned.
        name: Distinguishes two such callbacks in checkpoints.
        summary: See :class:`OptimCallback`.

    Raises:
        ValueError: If ``level`` is not a finite number or a schedule of them.
        MisconfigurationException: Under LBFGS, whose line search needs the loss of the gradient (in ``on_fit_start``).

    Example::

        >>> from lightning_optim import Flooding, Linear
        >>> Flooding(0.05)
        Flooding(0.05)
        >>> Flooding(Linear(0.0, 0.05)).level
        Linear(0.0, 0.05)

    For a Trainer: ``Trainer(callbacks=[Flooding(0.05)])``.
    """

    def __init__(self, level: float | Schedule, name: str | None = None, summary: bool = True) -> None:
        super().__init__(name, summary)
        self.level = check_number("level", level, schedule=True)
        self.reset()

    @property
    def needs_total(self) -> bool:
        return is_scheduled(self.level)

    def reset(self) -> None:
        self._now = 0.0  # the level in this batch
        self._seen = 0  # micro-batches on this rank
        self._below: Tensor | None = None  # those with a loss below the level, on its device
        self._watches_first_epoch = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        refuse_line_search(self, trainer)
        self.session.on_loss(self, self._flood)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._now = value_at(self.level, self.steps[0] if self.steps else 0, self.session.total)

    @torch.no_grad()
    def _flood(self, loss: Tensor, grad: Tensor) -> Tensor:
        above = loss.to(accumulation_dtype(loss.dtype)) - self._now
        module = self.session.trainer.lightning_module
        if not getattr(module, "second_pass", False):  # SharpnessAwareMixin evaluates each batch twice
            self._seen += 1
            below = (above < 0.0).sum()
            self._below = below if self._below is None else self._below.to(below.device) + below
        return torch.where(above.isnan(), above, above.sign())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watches_first_epoch and self._seen and not trainer.fast_dev_run:
            self._watches_first_epoch = False
            if self._below is not None and int(self._below) == self._seen:
                rank_zero_warn(
                    f"Every loss of the first epoch was below the level of {self.brief}, so that each step made the"
                    " loss larger: choose a level below the loss of an untrained model."
                )

    # ---- reading -----------------------------------------------------------------------------------------------------

    def describe_run(self) -> str:
        return f"the training loss is kept near {written(self.level)} (flooding)"

    def report(self) -> str:
        if not self._seen or self._below is None:
            return ""
        ranks = " of this rank" if self.session.trainer.world_size > 1 else ""
        share = int(self._below) / self._seen
        return f"{100.0 * share:.1f} % of {self._seen} micro-batches{ranks} had a loss below the flooding level"

    # ---- state -------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return {"seen": self._seen, "watches_first_epoch": self._watches_first_epoch, **self.rank_state()}

    def rank_state(self) -> dict[str, Tensor]:
        return {} if self._below is None else {"below": self._below}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._seen, self._below = extra["seen"], extra.get("below")
        self._watches_first_epoch = extra["watches_first_epoch"]
