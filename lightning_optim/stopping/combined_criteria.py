"""Combine several criteria: stop once all, any, or a number of them say so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_optim.base.arguments import check_number
from lightning_optim.base.construction import written
from lightning_optim.base.policy import belongs_to
from lightning_optim.base.state import nested
from lightning_optim.stopping.criteria import Criterion, Plateau
from lightning_optim.stopping.improvement import Metrics, mode_argument


class AtLeast(Criterion):
    """Stop once at least ``k`` of several criteria say so at the same validation.

    All of them are asked at every validation. A :class:`Plateau` says so for as long as its metric does not improve
    again, so the criteria need not become true together.

    Args:
        k: Number of criteria, from 1 to all.
        criteria: The criteria, a list of at least one.
        more: More criteria, if they are written one after another: ``AtLeast(1, a, b)`` is ``AtLeast(1, [a, b])``.

    Raises:
        ValueError: If these are not criteria, or ``k`` is not from 1 to their number.

    Example::

        >>> from lightning_optim.stopping.criteria import Plateau
        >>> two = AtLeast(2, [Plateau("loss", patience=1), Plateau("error", patience=1)])
        >>> two.update({"loss": 1.0, "error": 0.5}), two.update({"loss": 2.0, "error": 0.4})
        (False, False)
        >>> two.update({"loss": 2.0, "error": 0.4})
        True

    For a Trainer: ``Trainer(callbacks=[EarlyStopping(AtLeast(1, [Plateau("a"), Plateau("b")]), best_by="a")])``.
    """

    identity_args = ("criteria",)
    criteria: list[Criterion]

    def __init__(self, k: int, criteria: Criterion | list[Criterion], *more: Criterion) -> None:
        listed = self._listed(k, criteria, *more)
        self.k = check_number("k", k, low=1, high=len(listed), integer=True)
        self.add_state("criteria", nested(listed))

    @classmethod
    def _listed(cls, k: object, criteria: object, *more: object) -> list[Criterion]:
        """Return the criteria as a list, whichever way they were written."""
        if isinstance(k, Criterion | list | tuple):
            counts = [one for one in (criteria, *more) if isinstance(one, int)]
            line = f"AtLeast({counts[0] if counts else 1}, {_as_list([k, criteria, *more])})"
            raise ValueError(f"`k` must be the number of criteria, which comes first: write {line}, got {k!r}")
        given: list[Any] = list(criteria) if isinstance(criteria, list | tuple) and not more else [criteria, *more]
        if not given or not all(isinstance(one, Criterion) for one in given):
            line = f"{cls.__name__}({f'{k}, ' if cls is AtLeast else ''}{_as_list(given)})"
            shown = given if more else criteria
            told = f"got {shown!r}{belongs_to(given, Criterion)}"
            raise ValueError(f"`criteria` must be one criterion or more, written as {line}, {told}")
        for one in given:
            one.check_complete()
        return given

    @property
    def _arguments(self) -> list[Any]:
        """Print the criteria as a list, whichever way they were written."""
        arguments = super()._arguments
        if not any(one.name == "criteria" for one in arguments):  # of a subclass with other arguments
            return arguments
        listed = [one._replace(text=written(self.criteria)) if one.name == "criteria" else one for one in arguments]
        return [one for one in listed if one.name]

    @property
    def monitors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for criterion in self.criteria for name in criterion.monitors))

    def update(self, metrics: Metrics) -> bool:
        stops = [criterion.update(metrics) for criterion in self.criteria]
        self._gather(self.criteria)
        stop = sum(stops) >= self.k
        self.reason = " ".join(c.reason for c, says in zip(self.criteria, stops, strict=True) if says) if stop else ""
        return stop

    def _gather(self, asked: list[Criterion]) -> None:
        """Take over from the criteria that were asked at this validation whether, and what, improved."""
        improved = [one for one in asked if one.improved]
        self.improved = bool(improved)
        told = [one.improvement or f"Metric {', '.join(one.monitors)} improved." for one in improved]
        self.improvement = " ".join(dict.fromkeys(told))


class AllOf(AtLeast):
    """Stop once all of several criteria say so at the same validation: :class:`AtLeast` with their number.

    Args:
        criteria: The criteria, a list of at least one.
        more: More criteria, if they are written one after another: ``AllOf(a, b)`` is ``AllOf([a, b])``.

    Raises:
        ValueError: If these are not criteria.

    Example::

        >>> from lightning_optim.stopping.criteria import Plateau, Threshold
        >>> both = AllOf([Threshold("loss", 1.0), Plateau("error", patience=1)])
        >>> [both.update({"loss": loss, "error": 0.5}) for loss in (2.0, 2.0, 0.9)]
        [False, False, True]

    For a Trainer: ``Trainer(callbacks=[EarlyStopping(AllOf([Plateau("loss"), Plateau("error")]), best_by="error")])``.
    """

    def __init__(self, criteria: Criterion | list[Criterion], *more: Criterion) -> None:
        listed = self._listed(None, criteria, *more)
        super().__init__(len(listed), listed)


class AnyOf(AtLeast):
    """Stop as soon as one of several criteria says so.

    They are asked in the order of the list, and those behind the first that stops are not: their best value and their
    patience stay as they were. Lightning's ``EarlyStopping`` is the order non-finite, threshold, divergence, plateau.

    Args:
        criteria: The criteria, a list of at least one.
        more: More criteria, if they are written one after another: ``AnyOf(a, b)`` is ``AnyOf([a, b])``.

    Raises:
        ValueError: If these are not criteria.

    Example::

        >>> from lightning_optim.stopping.criteria import NonFinite, Plateau
        >>> both = AnyOf([NonFinite("loss"), Plateau("loss", patience=1)])
        >>> [both.update({"loss": loss}) for loss in (2.0, float("inf"), 1.0, 1.5)]
        [False, True, False, True]

    For a Trainer: ``Trainer(callbacks=[EarlyStopping(AnyOf([NonFinite("loss"), Plateau("loss")]))])``.
    """

    def __init__(self, criteria: Criterion | list[Criterion], *more: Criterion) -> None:
        super().__init__(1, criteria, *more)

    def update(self, metrics: Metrics) -> bool:
        self.reason = ""
        for index, criterion in enumerate(self.criteria):
            stop = criterion.update(metrics)
            self._gather(self.criteria[: index + 1])  # those behind it are as they were at an earlier validation
            if stop:
                self.reason = criterion.reason
                return True
        return False


def _as_list(given: object) -> str:
    """Return a list of criteria as one writes it, for a message; a metric's name stands for a plateau of it."""
    each = [f"Plateau({one!r}{mode_argument(one)})" if isinstance(one, str) else repr(one) for one in _flat(given)]
    return f"[{', '.join(each) or repr(Plateau('val_loss'))}]"


def _flat(given: object) -> Iterator[str | Criterion]:
    """Yield the criteria and names in nested lists."""
    if isinstance(given, str | Criterion):
        yield given
    elif isinstance(given, list | tuple | dict):
        for one in given:
            yield from _flat(one)
