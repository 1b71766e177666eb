"""Find the reason why training stops, the same sentence on all ranks that have none of their own."""

from __future__ import annotations

from enum import Enum

from lightning_optim.runtime.callback_state import from_each_rank
from lightning_optim.runtime.lightning.packages import found, package_of
from lightning_optim.stopping.combined_criteria import AnyOf
from lightning_optim.stopping.criteria import Criterion, Divergence, NonFinite, Plateau, Threshold


class EarlyStoppingReason(Enum):
    """Reason why training stopped, with the names and values of Lightning's enum.

    Each package has an enum of its own, an enum cannot have a second base, and Lightning before 2.6 has none.
    """

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


_REASONS = {
    NonFinite: EarlyStoppingReason.NON_FINITE_METRIC,
    Threshold: EarlyStoppingReason.STOPPING_THRESHOLD,
    Divergence: EarlyStoppingReason.DIVERGENCE_THRESHOLD,
    Plateau: EarlyStoppingReason.PATIENCE_EXHAUSTED,
}


def reason_to_stop(criterion: Criterion, world_size: int) -> tuple[EarlyStoppingReason, str]:
    """Return the reason to stop: this rank's, or that of the first rank that has one. Call it on all ranks.

    Args:
        criterion: The criterion, after the validation at which some rank decided to stop.
        world_size: Number of processes.

    Returns:
        Lightning's reason, which for a criterion of a user is ``PATIENCE_EXHAUSTED``, and a sentence.
    """
    candidates = criterion.criteria if isinstance(criterion, AnyOf) else [criterion]
    kind = next((type(one) for one in candidates if one.reason), Plateau)
    mine = (_REASONS.get(kind, EarlyStoppingReason.PATIENCE_EXHAUSTED).value, criterion.reason)
    reasons = from_each_rank(mine, world_size)
    if mine[1]:
        return EarlyStoppingReason(mine[0]), mine[1]
    number, reason = next((one for one in reasons if one[1]), mine)
    return EarlyStoppingReason(number), f"Another rank decided to stop. {reason}".strip()


def as_lightnings(reason: EarlyStoppingReason, package: str | None) -> Enum:
    """Return the member of Lightning's enum for a reason; the reason itself if the version has no such enum.

    Args:
        reason: The reason.
        package: Name of the package whose enum is used. ``None``: the first that is imported.
    """
    kinds = found("EarlyStoppingReason", "callbacks.early_stopping")
    kind = next((kind for kind in kinds if package in (None, package_of(kind))), EarlyStoppingReason)
    return kind[reason.name]
