"""Find out before the first step that a run has too few validations for a criterion to stop it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_optim.runtime.lightning import Trainer
from lightning_optim.runtime.step import micro_batches
from lightning_optim.stopping.combined_criteria import AnyOf, AtLeast
from lightning_optim.stopping.criteria import DEFAULT_PATIENCE, Criterion, NonFinite, Plateau


def why_unreachable(criterion: Criterion, patience: int | float | None, trainer: Trainer, at_epoch_end: bool) -> str:
    """Return a sentence if no validation of the whole run can be one at which the criterion stops; else empty.

    Args:
        criterion: The criterion.
        patience: The argument of :class:`~lightning_optim.EarlyStopping` if the criterion was made from it.
        trainer: The Trainer, when its data are set up.
        at_epoch_end: True if the metric is read at the end of each training epoch; else after each validation.
    """
    needed = checks_needed(criterion)
    if math.isinf(needed):  # by intention
        return ""
    checks = 0.0
    for more in _checks_by_epoch(trainer, at_epoch_end):
        checks += more
        if checks >= needed:
            return ""
    if not checks:  # the metric is never read, of which the end of the fit warns
        return ""
    rule = f"{criterion!r} stops" if patience is None else f"`patience={patience}` stops"
    return (
        f"EarlyStopping cannot stop this run: {rule} at validation {needed:.0f} at the earliest, since the first one"
        f" counts as an improvement, and the run has {checks:.0f}. Choose a smaller patience, or train longer;"
        " `patience=math.inf` keeps the best weights without a stop."
    )


def checks_needed(criterion: Criterion) -> float:
    """Return the number of validations, from now on, up to the first at which the criterion can stop.

    ``inf``: it never stops. A criterion of which this is not known counts as one that can stop at once, and so does a
    plateau with the default patience.

    Example::

        >>> checks_needed(Plateau("loss", patience=5)), checks_needed(Plateau("loss", patience=math.inf))
        (6, inf)
        >>> checks_needed(Plateau("loss"))  # the default, which nobody has asked for
        1
        >>> checks_needed(AnyOf([NonFinite("loss"), Plateau("loss", patience=5)]))
        6
    """
    own = type(criterion).update
    if own is Plateau.update and isinstance(criterion, Plateau):
        first_improves = type(criterion).better is Criterion.better and math.isinf(criterion.best)
        return criterion.patience - criterion.wait + first_improves if criterion.patience > DEFAULT_PATIENCE else 1
    if own is AnyOf.update and isinstance(criterion, AnyOf):
        # That a metric is not finite is an accident, for which no run is planned.
        planned = [one for one in criterion.criteria if not isinstance(one, NonFinite)]
        return min(map(checks_needed, planned), default=1)
    if own is AtLeast.update and isinstance(criterion, AtLeast):
        return sorted(map(checks_needed, criterion.criteria))[criterion.k - 1]
    return 1


def _checks_by_epoch(trainer: Trainer, at_epoch_end: bool) -> Iterator[float]:
    """Yield how often the metric is read, at most, in each epoch of the whole run; ``inf`` if that is not known."""
    batches: float = trainer.num_training_batches
    if trainer.reload_dataloaders_every_n_epochs:
        batches = math.inf  # another number in each epoch
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if math.isinf(batches) or not trainer.lightning_module.automatic_optimization:
        steps = math.inf  # the number of epochs, or of steps in one, is not known
    if math.isinf(epochs) and math.isinf(steps):
        yield math.inf
    done, epoch = 0.0, 0
    while epoch < epochs and steps > 0:
        micro = micro_batches(trainer, epoch)
        in_epoch = min(batches, steps * micro)
        yield 1 if at_epoch_end else _validations(trainer, epoch, done, in_epoch)
        done, epoch = done + in_epoch, epoch + 1
        steps -= math.ceil(in_epoch / micro) if math.isfinite(steps) else 0


def _validations(trainer: Trainer, epoch: int, done: float, batches: float) -> float:
    """Return the number of validations in the batches of an epoch, ``done`` batches after the start of the run."""
    interval, every = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if interval is None:  # by the clock
        return math.inf
    if every is not None and (epoch + 1) % every:
        return 0
    at_end = isinstance(trainer.val_check_interval, float) and trainer.val_check_interval == 1.0
    if math.isinf(batches):
        return 1 if at_end and every is not None else math.inf
    before = done if every is None else 0.0
    return (before + batches) // interval - before // interval
