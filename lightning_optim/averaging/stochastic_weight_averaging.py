"""Average the weights of the last epochs, with the arguments of Lightning's ``StochasticWeightAveraging``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_optim.averaging.averages.avg_fn import AvgFnAverage
from lightning_optim.averaging.averages.swa import SWA
from lightning_optim.averaging.weight_averaging import WeightAveraging
from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.runtime.lightning import LightningModule, MisconfigurationException, Trainer


class StochasticWeightAveraging(WeightAveraging):
    r"""Average the weights at the ends of the last epochs, with the arguments of Lightning's callback of this name.

    It is :class:`WeightAveraging` with :class:`SWA` (:math:`a \leftarrow a + (w - a) / (n + 1)`,
    `arXiv:1803.05407 <https://arxiv.org/abs/1803.05407>`_), ``every="epoch"`` and ``buffers="refresh"``. The
    differences from Lightning's callback are:

    * The weights at the end of the last epoch are in the average, and those before ``swa_epoch_start`` are not.
    * Validations and checkpoints use the average. The module ends with it also after an early stop and at
      ``max_steps``.
    * The learning-rate schedule stays the user's, unless ``swa_lrs`` is given.
    * BatchNorm statistics are estimated without an extra optimizer step, hook or epoch.
    * Several optimizers and sharded models work.

    Args:
        swa_lrs: Learning rate to which the rates of the first averaged epoch are annealed, or a list with one for each
            parameter group. SWA needs a rate that stays high. A group that a fine-tuning callback adds later is
            annealed from its own rate, to the last of the list. Default ``None``: the rates are not changed.
        swa_epoch_start: First averaged epoch: an integer E >= 1 counts from 1; a float in [0, 1] stands for
            ``int(swa_epoch_start * max_epochs)``. Default 0.8.
        annealing_epochs: Number of epochs of the annealing, >= 0. Default 10.
        annealing_strategy: ``"cos"`` (default) or ``"linear"``.
        avg_fn: Function ``(averaged, weight, number of updates before) -> averaged`` of tensors, instead of the mean.
        device: Device of the averaged tensors. Default the CPU, as in Lightning. ``None``: that of the weights, which a
            sharded model on an accelerator needs.
        refresh_batches: See :class:`WeightAveraging`.
        refresh_loader: See :class:`WeightAveraging`.
        evaluate: See :class:`WeightAveraging`.
        apply_at_end: See :class:`WeightAveraging`.
        name: See :class:`WeightAveraging`.
        summary: See :class:`OptimCallback`.

    Raises:
        ValueError: If an argument is not allowed.
        MisconfigurationException: For a fraction as ``swa_epoch_start`` in a run without ``max_epochs``, or a list of
            rates whose length differs from the number of parameter groups of an optimizer.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StochasticWeightAveraging(swa_lrs=0.05)], logger=False)
        >>> StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=0.75).average
        SWA()
    """

    _anneal: ClassVar[dict[str, Callable[[float], float]]] = {
        "cos": lambda part: (1.0 - math.cos(math.pi * part)) / 2.0,
        "linear": lambda part: part,
    }

    def __init__(
        self,
        swa_lrs: float | list[float] | None = None,
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: Callable[[Tensor, Tensor, Tensor], Any] | None = None,  # a YAML parser compares annotations of results
        device: str | torch.device | None = "cpu",
        *,
        refresh_batches: int | None = 100,
        refresh_loader: Any = None,
        evaluate: bool = True,
        apply_at_end: bool = True,
        name: str | None = None,
        summary: bool = True,
    ) -> None:
        for lr in swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]:
            if lr is not None:
                check_number("swa_lrs", lr, low=0.0, low_open=True)
        if isinstance(swa_epoch_start, float):
            check_number("swa_epoch_start", swa_epoch_start, low=0.0, high=1.0)
        else:
            check_number("swa_epoch_start", swa_epoch_start, low=1, integer=True)
        check_number("annealing_epochs", annealing_epochs, low=0, integer=True)
        check_choice("annealing_strategy", annealing_strategy, Literal["cos", "linear"])
        if avg_fn is not None and not callable(avg_fn):
            raise ValueError(f"`avg_fn` must be a function, got {avg_fn!r}")
        super().__init__(
            SWA() if avg_fn is None else AvgFnAverage(avg_fn),
            every="epoch",
            device=device,
            buffers="refresh",
            refresh_batches=refresh_batches,
            refresh_loader=refresh_loader,
            evaluate=evaluate,
            apply_at_end=apply_at_end,
            name=name,
            summary=summary,
        )
        self.swa_lrs, self.swa_epoch_start = swa_lrs, swa_epoch_start
        self.annealing_epochs, self.annealing_strategy = annealing_epochs, annealing_strategy

    def reset(self) -> None:
        super().reset()
        # For each parameter group, the rate and the epoch at which its annealing begins.
        self._first_lrs: list[list[float]] = []
        self._first_epochs: list[list[int]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and isinstance(self.swa_epoch_start, float) and trainer.max_epochs in (None, -1):
            raise MisconfigurationException(
                f"StochasticWeightAveraging(swa_epoch_start={self.swa_epoch_start}) is a fraction of `max_epochs`,"
                " which this run does not have: set `Trainer(max_epochs=…)`, or pass the epoch as an integer."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if isinstance(self.swa_lrs, list):
            for optimizer in trainer.optimizers:
                count, groups = len(self.swa_lrs), len(optimizer.param_groups)
                # A resumed run may have groups that were added later, which get the last rate.
                if not 0 < count <= groups or (count < groups and trainer.ckpt_path is None):
                    raise MisconfigurationException(
                        f"StochasticWeightAveraging(swa_lrs={self.swa_lrs}): pass a number, or one rate for each of the"
                        f" {groups} parameter groups of {type(optimizer).__name__}."
                    )

    def _describe_when(self) -> str:
        return f"every epoch from epoch {self.first_epoch(self.session.trainer)} on"

    def first_epoch(self, trainer: Trainer) -> int:
        """Return the first epoch, counted from 0, at the end of which the average is updated."""
        if isinstance(self.swa_epoch_start, float):
            assert trainer.max_epochs is not None
            return max(int(trainer.max_epochs * self.swa_epoch_start) - 1, 0)
        return self.swa_epoch_start - 1

    def _due_after_epoch(self, step: int, epoch: int) -> bool:
        return epoch >= self.first_epoch(self.session.trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.swa_lrs is None or trainer.current_epoch < self.first_epoch(trainer):
            return
        self._remember_groups(trainer)
        for optimizer, lrs, epochs in zip(trainer.optimizers, self._first_lrs, self._first_epochs, strict=True):
            # `strict=False`, since a group may have been removed.
            for place, (group, begun, epoch) in enumerate(zip(optimizer.param_groups, lrs, epochs, strict=False)):
                part = (trainer.current_epoch - epoch) / self.annealing_epochs if self.annealing_epochs else 1.0
                share = self._anneal[self.annealing_strategy](min(1.0, part))
                # Set at each batch, since the user's schedule goes on and sets the rate too.
                now = self._target_lr(place) * share + begun * (1.0 - share)
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(now)
                else:
                    group["lr"] = now

    def _remember_groups(self, trainer: Trainer) -> None:
        """Remember the rate of each parameter group at the first averaged epoch, or when the group is added later."""
        first = self.first_epoch(trainer)
        begins = trainer.current_epoch if self._first_lrs else first
        for held in (self._first_lrs, self._first_epochs):
            held.extend([] for _ in trainer.optimizers[len(held) :])
        for optimizer, lrs, epochs in zip(trainer.optimizers, self._first_lrs, self._first_epochs, strict=True):
            epochs += [first] * (len(lrs) - len(epochs))  # after loading a checkpoint that has only rates
            lrs += [float(group["lr"]) for group in optimizer.param_groups[len(lrs) :]]
            epochs += [begins] * (len(lrs) - len(epochs))

    def _target_lr(self, place: int) -> float:
        if isinstance(self.swa_lrs, list):
            return self.swa_lrs[min(place, len(self.swa_lrs) - 1)]
        assert self.swa_lrs is not None
        return self.swa_lrs

    def extra_state(self) -> dict[str, Any]:
        extra = super().extra_state()
        return {**extra, "first_lrs": self._first_lrs, "first_epochs": self._first_epochs} if self._first_lrs else extra

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._first_lrs = [list(lrs) for lrs in extra.get("first_lrs", [])]
        self._first_epochs = [list(epochs) for epochs in extra.get("first_epochs", [])]
        super().load_extra_state(extra)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        theirs = checkpoint.get("callbacks", {}).get("StochasticWeightAveraging")
        if self._stage == "fit" and theirs and theirs.get("n_averaged"):
            self._loaded = {
                "counters": [],
                "raw": {},
                "averaged": theirs["average_model_state"],
                "updates_of_lightning": theirs["n_averaged"],
            }
