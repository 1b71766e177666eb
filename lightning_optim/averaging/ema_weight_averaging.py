"""Lightning's ``EMAWeightAveraging``, with its arguments, exact in every precision and strategy."""

from __future__ import annotations

import torch

from lightning_optim.averaging.ema import EMA
from lightning_optim.averaging.weight_averaging import WeightAveraging
from lightning_optim.base.arguments import check_number


class EMAWeightAveraging(WeightAveraging):
    r"""Lightning's ``EMAWeightAveraging``, on top of :class:`WeightAveraging` with ``EMA(decay, warmup=None)``.

    Different from Lightning's: ``update_every_n_steps=k`` forgets as fast as an update at each step, with
    ``decay ** k``; ``update_starting_at_epoch=E`` leaves out the epochs before E (Lightning's averages from the first
    step on, and once more at the end of each epoch from E on); an average that never started is never used; steps that
    a GradScaler skipped do not count; the average is in fp32 for bf16 weights; integer buffers are the latest. All that
    :class:`WeightAveraging` promises for files, exceptions and sharded models holds. A subclass that overrides
    :meth:`should_update` is asked as by Lightning's, and each update then decays once.

    Args:
        device: Where the average is kept. Default: where the model is.
        use_buffers: Whether floating-point buffers are averaged; if not, the latest are used.
        decay: As of :class:`EMA`. Default 0.999, as in Lightning.
        update_every_n_steps: The steps between two updates, >= 1, counted from the first step of the run.
        update_starting_at_step: The steps before the first update. If an epoch is given too, both must be reached.
        update_starting_at_epoch: The epochs before the first update, >= 0.
        evaluate: As of :class:`WeightAveraging`.
        apply_at_end: As of :class:`WeightAveraging`.
        name: As of :class:`WeightAveraging`.

    Raises:
        ValueError: If a number is out of range.

    Example::

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
    ) -> None:
        check_number("update_every_n_steps", update_every_n_steps, low=1, integer=True)
        for argument in ("update_starting_at_step", "update_starting_at_epoch"):
            if locals()[argument] is not None:
                check_number(argument, locals()[argument], low=0, integer=True)
        super().__init__(
            EMA(decay, warmup=None),
            start=update_starting_at_step or 0,
            every=update_every_n_steps,
            device=device,
            buffers="average" if use_buffers else "copy",
            evaluate=evaluate,
            apply_at_end=apply_at_end,
            name=name,
        )
        self.update_starting_at_epoch = update_starting_at_epoch

    def _due(self, step: int) -> bool:
        assert isinstance(self.every, int)
        epoch = None if self.fit is None else self.fit.trainer.current_epoch
        late = epoch is None or self.update_starting_at_epoch is None or epoch >= self.update_starting_at_epoch
        return late and step > self._start_step and (step - 1) % self.every == 0
