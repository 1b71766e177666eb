"""Average the weights exponentially, with the arguments of Lightning's ``EMAWeightAveraging``."""

from __future__ import annotations

import torch

from lightning_optim.averaging.averages.ema import EMA
from lightning_optim.averaging.weight_averaging import WeightAveraging
from lightning_optim.base.arguments import check_number


class EMAWeightAveraging(WeightAveraging):
    r"""Average the weights exponentially, with the arguments of Lightning's ``EMAWeightAveraging``.

    It is :class:`WeightAveraging` with ``EMA(decay, warmup=None)``: :math:`e \leftarrow e + (1 - d^k)(w - e)`, with
    :math:`k` the number of optimizer steps since the last update. The differences from Lightning's callback are:

    * ``update_every_n_steps=k`` forgets as fast as an update at each step, since it uses the decay :math:`d^k`.
    * ``update_starting_at_epoch=E`` skips the epochs before E. Lightning's averages from the first step on, and once
      more at the end of each epoch from E on.
    * An average without an update is never used.
    * Steps that a GradScaler skips do not count.
    * The average of bf16 weights is kept in fp32; integer buffers are the latest ones.
    * Checkpoints, exceptions and sharded models are handled as in :class:`WeightAveraging`.

    A subclass that overrides :meth:`should_update` is called as Lightning calls it, and each update then decays once.

    Args:
        device: Device of the averaged tensors. Default: that of the weights.
        use_buffers: If True (default), floating-point buffers are averaged; if False, the latest are used.
        decay: Share of the average that is kept per optimizer step, in [0, 1). Default 0.999, as in Lightning: the
            average looks back about :math:`1 / (1 - decay)` steps.
        update_every_n_steps: Optimizer steps from one update to the next, >= 1, counted from the first step of the run.
        update_starting_at_step: Optimizer steps before the first update, >= 0. If an epoch is given too, both must be
            reached.
        update_starting_at_epoch: Epochs before the first update, >= 0.
        evaluate: See :class:`WeightAveraging`.
        apply_at_end: See :class:`WeightAveraging`.
        name: See :class:`WeightAveraging`.
        summary: See :class:`OptimCallback`.

    Raises:
        ValueError: If a number is out of its range.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[EMAWeightAveraging(decay=0.99)], logger=False)
        >>> EMAWeightAveraging(decay=0.99).average
        EMA(decay=0.99, warmup=None)
    """

    def __init__(
        self,
        device: str | int | torch.device | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        *,
        evaluate: bool = True,
        apply_at_end: bool = True,
        name: str | None = None,
        summary: bool = True,
    ) -> None:
        check_number("update_every_n_steps", update_every_n_steps, low=1, integer=True)
        if update_starting_at_step is not None:
            check_number("update_starting_at_step", update_starting_at_step, low=0, integer=True)
        if update_starting_at_epoch is not None:
            check_number("update_starting_at_epoch", update_starting_at_epoch, low=0, integer=True)
        super().__init__(
            EMA(decay, warmup=None),
            start=update_starting_at_step or 0,
            every=update_every_n_steps,
            device=device,
            buffers="average" if use_buffers else "copy",
            evaluate=evaluate,
            apply_at_end=apply_at_end,
            name=name,
            summary=summary,
        )
        self.update_starting_at_epoch = update_starting_at_epoch

    def _describe_when(self) -> str:
        epoch = self.update_starting_at_epoch
        return f"{super()._describe_when()} from epoch {epoch} on".lstrip() if epoch else super()._describe_when()

    def _due_after_step(self, step: int) -> bool:
        assert isinstance(self.every, int)
        epoch = None if self.fit is None else self.fit.trainer.current_epoch
        late = epoch is None or self.update_starting_at_epoch is None or epoch >= self.update_starting_at_epoch
        return late and step > self._start_step and (step - 1) % self.every == 0
