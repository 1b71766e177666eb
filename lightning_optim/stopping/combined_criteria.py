"""Combine several criteria: stop once all, any, or a number of them say so."""

from __future__ import annotations

from lightning_optim.base.arguments import check_number
from lightning_optim.base.policy import belongs_to
from lightning_optim.base.state import nested
from lightning_optim.stopping.criteria import Criterion
from lightning_optim.stopping.improvement import Metrics


class AtLeast(Criterion):
    """Stop once at least ``k`` of several criteria say so at the same validation.

    All of them are asked at every validation. A :class:`Plateau` says so for as long as its metric does not improve
    again, so the criteria need not become true together.

    Args:
        k: Number of criteria, from 1 to all.
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
    criteria: list[Criterion]

    def __init__(self, k: int, criteria: list[Criterion]) -> None:
        listed = _listed(criteria)
        self.k = check_number("k", k, low=1, high=len(listed), integer=True)
        self.add_state("criteria", nested(listed))

    @property
    def monitors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for criterion in self.criteria for name in criterion.monitors))

    def update(self, metrics: Metrics) -> bool:
        stops = [criterion.update(metrics) for criterion in self.criteria]
        self.improved = any(criterion.improved for criterion in self.criteria)
        stop = sum(stops) >= self.k
        self.reason = " ".join(c.reason for c, says in zip(self.criteria, stops, strict=True) if says) if stop else ""
        return stop


class AllOf(AtLeast):
    """Stop once all of several criteria say so at the same validation: :class:`AtLeast` with their number.

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
        raise ValueError(
            f"`criteria` must be a list of at least one criterion, got {criteria!r}{belongs_to(criteria, Criterion)}"
        )
    for criterion in criteria:  # type: ignore[attr-defined]
        criterion.check_complete()
    return list(criteria)  # type: ignore[call-overload]
