"""Find the reason why training stops, the same sentence on all ranks that have none of their own."""

from __future__ import annotations

from lightning_optim.runtime.callback_state import from_each_rank
from lightning_optim.runtime.lightning import EarlyStoppingReason
from lightning_optim.stopping.combined_criteria import AnyOf
from lightning_optim.stopping.criteria import Criterion, Divergence, NonFinite, Plateau, Threshold

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
