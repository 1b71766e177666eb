"""Every combination that is refused, with the sentence that says what to do instead."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import LBFGS

from lightning_optim.base.policy import Policy
from lightning_optim.runtime.lightning import (
    DeepSpeedStrategy,
    FSDPStrategy,
    GradientAccumulationScheduler,
    MisconfigurationException,
    ModelParallelStrategy,
    StochasticWeightAveraging,
    Strategy,
    Trainer,
    WeightAveraging,
    XLAStrategy,
    rank_zero_warn,
)
from lightning_optim.runtime.order import SessionCallback, Slot

_STRATEGIES = {
    DeepSpeedStrategy: "DeepSpeed keeps gradients and weights to itself; use DDP or `ModelParallelStrategy` (FSDP2)",
    FSDPStrategy: "FSDP1 hides parameters in flat shards; use `ModelParallelStrategy` (FSDP2)",
    XLAStrategy: "XLA was never checked; use one device, DDP or `ModelParallelStrategy` (FSDP2)",
}


def hides_weights(strategy: Strategy) -> str | None:
    """Why gradients and weights cannot be reached under this strategy, and what to use; ``None`` if they can."""
    return next((sentence for kind, sentence in _STRATEGIES.items() if isinstance(strategy, kind)), None)


def refuse_setup(callback: SessionCallback, trainer: Trainer) -> None:
    """Raise for what is known to be wrong before anything is installed."""
    name = type(callback).__name__
    if not isinstance(trainer, Trainer):
        raise MisconfigurationException(
            f"{name} got a Trainer of `{type(trainer).__module__.split('.')[0]}`, which is another class than that of"
            " `lightning`: write `from lightning.pytorch import Trainer`, and not `from pytorch_lightning`."
        )
    if callback.touches and (sentence := hides_weights(trainer.strategy)):
        raise MisconfigurationException(f"{name} acts on {' and '.join(sorted(callback.touches))}: {sentence}.")
    _refuse_same_job(callback, trainer)
    if callback.needs_total and trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise _no_total(callback)


def in_another_fit(callback: SessionCallback) -> MisconfigurationException:
    """Make the error for a callback that is in the running fit of another Trainer."""
    return MisconfigurationException(
        f"{type(callback).__name__} is in the running fit of another Trainer: give each Trainer an object of its own,"
        " such as `copy.deepcopy(callback)`."
    )


def nested_averages(callback: SessionCallback) -> MisconfigurationException:
    """Make the error for an average that would go into a module that holds another callback's average."""
    return MisconfigurationException(
        f"The module holds the average of another callback now, as in each validation with `evaluate=True`, and cannot"
        f" hold that of {type(callback).__name__} too: put it into a copy of the module, with"
        " `callback.averaged_weights(copy)`."
    )


def refuse_more_optimizers(callbacks: Sequence[SessionCallback], trainer: Trainer) -> None:
    """Raise if there are more optimizers by now than when the fit began."""
    before, now = min(len(callback.steps) for callback in callbacks), len(trainer.optimizers)
    if now > before:
        names = sorted({type(callback).__name__ for callback in callbacks})
        raise MisconfigurationException(
            f"The Trainer has {now} optimizers, and had {before} when the fit began, which {names} cannot follow: put"
            " another optimizer in the place of one, call `optimizer.add_param_group` for new parameters, or begin"
            " another fit."
        )


def _refuse_same_job(callback: SessionCallback, trainer: Trainer) -> None:
    name = type(callback).__name__
    slots = Counter(getattr(other, "slot", None) for other in trainer.callbacks)
    if callback.slot is Slot.CLIP:
        if slots[Slot.CLIP] > 1:
            raise MisconfigurationException(
                f"Two {name} callbacks clip the same gradients: give one a list of policies, which run in turn."
            )
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"{name} and `Trainer(gradient_clip_val={trainer.gradient_clip_val})` both clip: remove the argument."
            )
    if callback.slot is Slot.ACCUMULATE:
        if slots[Slot.ACCUMULATE] > 1:
            raise MisconfigurationException(
                f"Two {name} callbacks accumulate: keep one, with a dictionary of epochs if needed."
            )
        if any(isinstance(other, GradientAccumulationScheduler) for other in trainer.callbacks):
            raise MisconfigurationException(
                f"{name} and GradientAccumulationScheduler both accumulate: give {name} a dictionary."
            )
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"{name} and `Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})` both accumulate:"
                " remove the argument."
            )
    if callback.slot is Slot.AVERAGE:
        applied = [cb for cb in trainer.callbacks if getattr(cb, "slot", None) is Slot.AVERAGE and cb.apply_at_end]
        if len(applied) > 1 and not any(cb.evaluates for cb in applied):
            raise MisconfigurationException(
                f"{len(applied)} averages with `evaluate=False` and `apply_at_end=True`: the module can end with one."
                " Give the others `apply_at_end=False`."
            )
    if callback.slot is Slot.AVERAGE and callback.evaluates:
        if sum(getattr(other, "evaluates", False) for other in trainer.callbacks) > 1:
            raise MisconfigurationException(
                "Two averages with `evaluate=True`: validation can use one. Give the others `evaluate=False`."
            )
        theirs = [
            cb
            for cb in trainer.callbacks
            if isinstance(cb, WeightAveraging | StochasticWeightAveraging) and cb is not callback
        ]
        if theirs:
            raise MisconfigurationException(
                f"{name} and Lightning's {type(theirs[0]).__name__} both write the weights: remove one."
            )


def refuse_start(callback: SessionCallback, trainer: Trainer) -> None:
    """Raise for what is known once the optimizers are there."""
    acts_at_steps = callback.touches and callback.slot is not Slot.STOP
    if acts_at_steps and any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            f"{type(callback).__name__} acts once per optimizer step, and LBFGS evaluates many gradients within one:"
            " use a first-order optimizer."
        )


def warn_unsharded(trainer: Trainer) -> None:
    """Warn, by name, of trainable parameters that FSDP2 does not know."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy) or strategy.device_mesh["data_parallel"].size() == 1:
        return
    named = trainer.lightning_module.named_parameters()
    plain = [name for name, p in named if p.requires_grad and not isinstance(p, DTensor)]
    if plain:
        rank_zero_warn(
            "These trainable parameters are not under a `fully_shard`ed module, so nobody reduces their gradients and"
            f" the ranks drift apart: {plain}. Call `fully_shard` on a module that holds them."
        )


def refuse_parts(policy: Policy, parameters: Iterable[Tensor]) -> None:
    """Raise if a formula needs whole rows or matrices and a parameter is sharded so that no rank has them."""
    if policy.needs == "elements":
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            cut = [placement.dim for placement in parameter.placements if isinstance(placement, Shard)]
            if any(dim != 0 or policy.needs == "matrices" for dim in cut):
                raise MisconfigurationException(
                    f"{policy!r} is computed on whole {policy.needs}, and a parameter of shape {tuple(parameter.shape)}"
                    f" is sharded along {cut}: leave it out with `exclude=`, or train with DDP."
                )


def refuse_endless(callback: SessionCallback, total: int | float) -> None:
    """Raise if a schedule has no end to run to; only the loaded data tells where they have no length."""
    if callback.needs_total and math.isinf(total):
        raise _no_total(callback)


def _no_total(callback: SessionCallback) -> MisconfigurationException:
    return MisconfigurationException(
        f"{type(callback).__name__} has a schedule or a start given as a fraction, and this run has no end that is"
        " known: set `Trainer(max_steps=…)`, or `max_epochs` with data that have a length."
    )
