"""Several criteria at once."""

from __future__ import annotations

from typing import Any

from lightning_optim.base.arguments import check_number
from lightning_optim.stopping.criteria import Criterion, Metrics


class AtLeast(Criterion):
    """Stop once at least ``k`` of several criteria say so at the same check.

    All of them are asked at every check. A :class:`Plateau` says so for as long as its metric does not improve again,
    so the criteria need not become true together.

    Args:
        k: How many, from 1 to all.
        criteria: The criteria, at least one.

    Raises:
        ValueError: If ``criteria`` is not a list of criteria, or ``k`` not from 1 to their number.

    Example::

        >>> from lightning_optim.stopping.criteria import Plateau
        >>> two = AtLeast(2, [Plateau("loss", patience=1), Plateau("error", patience=1)])
        >>> two.update({"loss": 1.0, "error": 0.5}), two.update({"loss": 2.0, "error": 0.4})
        (False, False)
        >>> two.update({"loss": 2.0, "error": 0.4})
        True
    """

    identity_args = ("criteria",)

    def __init__(self, k: int, criteria: list[Criterion]) -> None:
        self.criteria = _listed(criteria)
        check_number("k", k, low=1, high=len(self.criteria), integer=True)
        self.k = k

    @property
    def monitors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for criterion in self.criteria for name in criterion.monitors))

    def update(self, metrics: Metrics) -> bool:
        stops = [criterion.update(metrics) for criterion in self.criteria]
        self.improved = any(criterion.improved for criterion in self.criteria)
        stop = sum(stops) >= self.k
        self.reason = " ".join(c.reason for c, says in zip(self.criteria, stops, strict=True) if says) if stop else ""
        return stop

    def reset(self) -> None:
        super().reset()
        for criterion in self.criteria:
            criterion.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"criteria": [[criterion.identity, criterion.state_dict()] for criterion in self.criteria]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of each criterion that was there; one that is new on resume begins there."""
        saved = self._with_identities(state["criteria"])
        for criterion in self.criteria:
            found = next((entry for entry in saved if entry[0] == criterion.identity), None)
            if found is not None:
                saved.remove(found)
                criterion.load_state_dict(found[1])

    def _with_identities(self, saved: list[Any]) -> list[Any]:
        """Add the identities to the states of a checkpoint of an earlier version, which holds them in order only."""
        if all(isinstance(entry, list | tuple) for entry in saved):
            return list(saved)
        if [sorted(entry) for entry in saved] != [sorted(criterion.state_dict()) for criterion in self.criteria]:
            raise ValueError(
                f"This checkpoint of an earlier version holds the states of {len(saved)} criteria in their order, and"
                f" they are not those of {[criterion.identity for criterion in self.criteria]}: resume with the same"
                " criteria in the same order."
            )
        return [(criterion.identity, entry) for criterion, entry in zip(self.criteria, saved, strict=True)]


class AllOf(AtLeast):
    """Stop once all of several criteria say so at the same check: :class:`AtLeast` with their number.

    Args:
        criteria: The criteria, at least one.

    Raises:
        ValueError: If ``criteria`` is not a list of criteria.

    Example::

        >>> from lightning_optim.stopping.criteria import Plateau, Threshold
        >>> both = AllOf([Threshold("loss", 1.0), Plateau("error", patience=1)])
        >>> [both.update({"loss": loss, "error": 0.5}) for loss in (2.0, 2.0, 0.9)]
        [False, False, True]
    """

    def __init__(self, criteria: list[Criterion]) -> None:
        super().__init__(len(_listed(criteria)), criteria)


class AnyOf(AtLeast):
    """Stop as soon as one of several criteria says so.

    They are asked in the order of the list, and those behind the first that stops are not: their best value and their
    patience stay as they were. Lightning's ``EarlyStopping`` is the order non-finite, threshold, divergence, plateau.

    Args:
        criteria: The criteria, at least one.

    Raises:
        ValueError: If ``criteria`` is not a list of criteria.

    Example::

        >>> from lightning_optim.stopping.criteria import NonFinite, Plateau
        >>> both = AnyOf([NonFinite("loss"), Plateau("loss", patience=1)])
        >>> [both.update({"loss": loss}) for loss in (2.0, float("inf"), 1.0, 1.5)]
        [False, True, False, True]
    """

    def __init__(self, criteria: list[Criterion]) -> None:
        super().__init__(1, criteria)

    def update(self, metrics: Metrics) -> bool:
        self.improved, self.reason = False, ""
        for criterion in self.criteria:
            stop = criterion.update(metrics)
            self.improved = self.improved or criterion.improved
            if stop:
                self.reason = criterion.reason
                return True
        return False


def _listed(criteria: object) -> list[Criterion]:
    listed = isinstance(criteria, list | tuple) and len(criteria) > 0
    if not listed or not all(isinstance(criterion, Criterion) for criterion in criteria):  # type: ignore[attr-defined]
        raise ValueError(f"`criteria` must be a list of at least one criterion, got {criteria!r}")
    return list(criteria)  # type: ignore[call-overload]
