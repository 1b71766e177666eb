"""Refuse combinations that cannot work, each with one sentence that names the fix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS

from lightning_optim.base.policy import Policy
from lightning_optim.base.shards import sharded_dim
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
from lightning_optim.runtime.lightning.packages import package_of
from lightning_optim.runtime.order import SessionCallback, Slot, callbacks_in

_STRATEGIES = {
    DeepSpeedStrategy: "DeepSpeed hides gradients and weights; use DDP or `ModelParallelStrategy` (FSDP2)",
    FSDPStrategy: "FSDP1 hides parameters in flat shards; use `ModelParallelStrategy` (FSDP2)",
    XLAStrategy: "XLA is not tested; use one device, DDP or `ModelParallelStrategy` (FSDP2)",
}


def hides_weights(strategy: Strategy) -> str | None:
    """Return a sentence if a strategy hides gradients and weights: the reason, and what to use; else ``None``."""
    return next((sentence for kind, sentence in _STRATEGIES.items() if isinstance(strategy, kind)), None)


def refuse_setup(callback: SessionCallback, trainer: Trainer) -> None:
    """Raise in ``setup``, before anything is installed, if the Trainer or another callback cannot go with this one."""
    name = type(callback).__name__
    if callback.touches and (sentence := hides_weights(trainer.strategy)):
        raise MisconfigurationException(f"{name} acts on {' and '.join(sorted(callback.touches))}: {sentence}.")
    if callback.slot is Slot.CLIP:
        _refuse_second_clipping(name, trainer)
    if callback.slot is Slot.ACCUMULATE:
        _refuse_second_accumulation(name, trainer)
    if callback.slot is Slot.AVERAGE:
        _refuse_second_average(callback, trainer)
    if callback.needs_total and trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise _unknown_length(callback)


def _refuse_second_clipping(name: str, trainer: Trainer) -> None:
    if len(callbacks_in(trainer, Slot.CLIP)) > 1:
        raise MisconfigurationException(
            f"Two {name} callbacks clip the same gradients: give one of them a list of policies, which act in turn."
        )
    if trainer.gradient_clip_val:
        raise _second(name, trainer, "gradient_clip_val", job="clip", off=None)


def _refuse_second_accumulation(name: str, trainer: Trainer) -> None:
    if len(callbacks_in(trainer, Slot.ACCUMULATE)) > 1:
        raise MisconfigurationException(
            f"Two {name} callbacks accumulate: keep one, with a dictionary of epochs to sizes if needed."
        )
    if any(isinstance(other, GradientAccumulationScheduler) for other in trainer.callbacks):
        raise MisconfigurationException(
            f"{name} and the GradientAccumulationScheduler of `{package_of(trainer)}` both accumulate: give {name} the"
            " dictionary of epochs to sizes."
        )
    if trainer.accumulate_grad_batches != 1:
        raise _second(name, trainer, "accumulate_grad_batches", job="accumulate", off=1)


def _second(name: str, trainer: Trainer, argument: str, job: str, off: Any) -> MisconfigurationException:
    """Make the error for a callback beside an argument of the Trainer that does the same job."""
    setting = f"{package_of(trainer)}.Trainer({argument}={getattr(trainer, argument)})"
    return MisconfigurationException(
        f"{name} and `{setting}` both {job}: remove the argument. If a package makes the Trainer and sets it, pass"
        f" `{argument}={off}` to the package, with the arguments that it hands to its Trainer (often called"
        " `trainer_kwargs`)."
    )


def _refuse_second_average(callback: SessionCallback, trainer: Trainer) -> None:
    averages = callbacks_in(trainer, Slot.AVERAGE)
    applied = [average for average in averages if getattr(average, "apply_at_end", False)]
    if len(applied) > 1 and not any(average.evaluates for average in applied):
        raise MisconfigurationException(
            f"{len(applied)} averages with `evaluate=False` have `apply_at_end=True`, and the module can hold only one"
            " after the fit: keep it for that one, and give the rest `apply_at_end=False`."
        )
    if not callback.evaluates:
        return
    if sum(average.evaluates for average in averages) > 1:
        raise MisconfigurationException(
            "Two averages have `evaluate=True`, and validation can use only one: give the rest `evaluate=False`."
        )
    lightnings = (WeightAveraging, StochasticWeightAveraging)
    for other in trainer.callbacks:
        if isinstance(other, lightnings) and other is not callback:
            raise MisconfigurationException(
                f"{type(callback).__name__} and the {type(other).__name__} of `{package_of(other)}` both write the"
                " weights: remove one."
            )


def refuse_start(callback: SessionCallback, trainer: Trainer) -> None:
    """Raise at ``on_fit_start``, when the optimizers exist, if one of them cannot go with the callback."""
    acts_at_steps = callback.touches and callback.slot is not Slot.STOP
    if acts_at_steps and any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            f"{type(callback).__name__} acts once per optimizer step, and LBFGS computes many gradients within one: use"
            " a first-order optimizer."
        )


def refuse_line_search(callback: SessionCallback, trainer: Trainer) -> None:
    """Raise under LBFGS if a callback changes gradients in the backward pass, and not the loss."""
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            f"{type(callback).__name__} changes gradients and not the loss, and the line search of LBFGS compares the"
            " two: use a first-order optimizer."
        )


def refuse_unknown_length(callback: SessionCallback, total: int | float) -> None:
    """Raise if a schedule needs the length of the run, and the loaded data show that there is none."""
    if callback.needs_total and math.isinf(total):
        raise _unknown_length(callback)


def _unknown_length(callback: SessionCallback) -> MisconfigurationException:
    return MisconfigurationException(
        f"{type(callback).__name__} has a schedule, or a start given as a fraction of the run, and the length of this"
        " run is unknown: set `Trainer(max_steps=…)`, or `max_epochs` with data that have a length or with"
        " `limit_train_batches=…`, the number of batches of an epoch."
    )


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
    """Raise if the Trainer has more optimizers than when the fit began."""
    before, now = min(len(callback.steps) for callback in callbacks), len(trainer.optimizers)
    if now > before:
        names = ", ".join(sorted({type(callback).__name__ for callback in callbacks}))
        raise MisconfigurationException(
            f"The Trainer has {now} optimizers, and had {before} when the fit began, which {names} cannot follow: put"
            " the new optimizer in the place of an old one, call `optimizer.add_param_group` for new parameters, or"
            " begin another fit."
        )


def warn_unsharded(trainer: Trainer) -> None:
    """Warn, by name, of trainable parameters that FSDP2 does not shard."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy) or strategy.device_mesh["data_parallel"].size() == 1:
        return
    named = trainer.lightning_module.named_parameters()
    plain = [name for name, p in named if p.requires_grad and not isinstance(p, DTensor)]
    if plain:
        rank_zero_warn(
            "These trainable parameters are in no module that `fully_shard` was called on, so that nothing averages"
            f" their gradients and the ranks drift apart: {plain}. Call `fully_shard` on a module that holds them."
        )


def refuse_split_units(policy: Policy, parameters: Iterable[Tensor]) -> None:
    """Raise if a formula needs whole rows or matrices and a parameter is sharded so that no rank has them."""
    if policy.needs == "elements" or policy.gathers:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            sharded = [dim for dim in map(sharded_dim, parameter.placements) if dim is not None]
            if any(dim != 0 or policy.needs == "matrices" for dim in sharded):
                raise MisconfigurationException(
                    f"{policy!r} is computed on whole {policy.needs}, and a parameter of shape {tuple(parameter.shape)}"
                    f" is sharded along the dimensions {sharded}: leave it out with `exclude=`, or train with DDP."
                )


def refuse_complex(policy: Policy, parameters: Mapping[str, Tensor]) -> None:
    """Raise if a formula has no meaning for complex numbers and a parameter is complex."""
    if policy.needs_real and (names := [name for name, parameter in parameters.items() if parameter.is_complex()]):
        raise MisconfigurationException(
            f"{policy!r} is not defined for complex weights, as in {names}: leave them out with `exclude=`."
        )


def refuse_looked_up_rows(policy: Policy, weights: Iterable[Tensor], rows: Iterable[Tensor]) -> None:
    """Raise if a formula needs whole matrices and would get the looked-up rows of a weight with a sparse gradient.

    Args:
        policy: The policy with the formula.
        weights: The parameters.
        rows: The same tensors, except for those with a sparse gradient, as
            :func:`~lightning_optim.base.sparse.dense_rows` returns them.
    """
    if policy.needs != "matrices":
        return
    for weight, its_rows in zip(weights, rows, strict=True):
        if its_rows is not weight:
            raise MisconfigurationException(
                f"{policy!r} is computed on whole matrices, and a parameter of shape {tuple(weight.shape)} has a sparse"
                " gradient, which holds the looked-up rows alone: leave it out with `exclude=`, or make its layer with"
                " `sparse=False`."
            )
