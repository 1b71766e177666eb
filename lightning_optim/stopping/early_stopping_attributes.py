"""Read and write the attributes of Lightning's ``EarlyStopping`` in the criterion, so that a change counts at once."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.stopping.combined_criteria import AnyOf
from lightning_optim.stopping.criteria import (
    DEFAULT_PATIENCE,
    Criterion,
    Divergence,
    NonFinite,
    Plateau,
    Threshold,
    check_patience,
)
from lightning_optim.stopping.directions import directions, modes_of_best
from lightning_optim.stopping.improvement import Best, Mode, check_monitor, initial_best
from lightning_optim.stopping.monitor_argument import check_early_stopping_monitor

C = TypeVar("C", bound=Criterion)

_ORDER = (NonFinite, Threshold, Divergence, Plateau)  # the order in which Lightning evaluates them


class EarlyStoppingAttributes:
    """Provide properties for the arguments of ``EarlyStopping``. A wrong value raises, as in the constructor.

    If ``monitor`` is a criterion, the arguments of the :class:`Plateau` in it can be changed too.
    """

    criterion: Criterion
    fit: Any
    _monitor: str | Criterion
    _mode: Mode
    _best_by: Best | None = None
    _restore_best: bool = False
    _before_fit: dict[str, Any]

    # ---- the metric and its direction -------------------------------------------------------------------------------

    @property
    def monitor(self) -> str:
        """Name of the metric; of a criterion, the first that it reads, since other packages read this attribute.

        A criterion can be assigned too, and is then :attr:`criterion`.
        """
        return self._monitor if isinstance(self._monitor, str) else self.criterion.monitors[0]

    @monitor.setter
    def monitor(self, value: str | Criterion) -> None:
        check_early_stopping_monitor(value)
        if isinstance(value, Criterion):
            value.check_complete()
            check_best(value, self.best_by, self.restore_best)
            self._best_by = self._best_with(value, self.mode)
            self.criterion = value
        elif isinstance(self._monitor, Criterion):
            self._best_by = self._best_with(None, self.mode)
            self.criterion = AnyOf([NonFinite(value), Plateau(value, mode=self.mode)])
        else:
            for one in self._alternatives():
                one.monitor = check_monitor(value)
        self._monitor = value

    @property
    def mode(self) -> Mode:
        """``"min"`` if smaller values are better, ``"max"`` if larger ones are."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        if self._mode == value:
            return
        best_by = self._best_with(self._criterion_passed, value)
        of_criterion = best_by is None or not isinstance(self._monitor, Criterion)
        if of_criterion:
            check_choice("mode", value, Mode)
        for one in self._alternatives() if of_criterion else ():
            if hasattr(one, "mode"):
                one.mode = value
            if hasattr(one, "best"):
                best = one.best
                one.add_state("best", initial_best(value))
                one.best = one.best if math.isinf(best) else best
        self._best_by, self._mode = best_by, value

    @property
    def best_by(self) -> str | dict[str, float] | list[str] | None:
        """Metrics that decide which weights are best; ``None``: an improvement of the criterion."""
        return None if self._best_by is None else self._best_by.by

    @best_by.setter
    def best_by(self, value: str | dict[str, float] | list[str] | None) -> None:
        check_best(self.criterion, value, self.restore_best)
        self._best_by = None if value is None else _best(value, self.mode, self._criterion_passed)

    @property
    def _criterion_passed(self) -> Criterion | None:
        """The criterion, if the user wrote it: with a metric's name all directions are those of ``mode``."""
        return self.criterion if isinstance(self._monitor, Criterion) else None

    def _best_with(self, criterion: Criterion | None, mode: Mode) -> Best | None:
        """Return what compares by ``best_by`` for another criterion or mode; the present one if nothing changes."""
        present = self._best_by
        new = None if present is None else _best(present.by, mode, criterion)
        return present if new is None or present is None or new.mode == present.mode else new

    @property
    def restore_best(self) -> bool:
        """True if the best weights are kept, and restored at the end of the fit."""
        return self._restore_best

    @restore_best.setter
    def restore_best(self, value: bool) -> None:
        check_best(self.criterion, self.best_by, value)
        self._restore_best = value

    # ---- the plateau -------------------------------------------------------------------------------------------------

    @property
    def patience(self) -> int | float | None:
        """Number of validations without improvement after which training stops; ``None`` without a plateau."""
        plateau = self._find(Plateau)
        return None if plateau is None else plateau.patience

    @patience.setter
    def patience(self, value: int | float) -> None:
        check_patience(value)
        self._owner(Plateau, "patience", value).patience = value

    @property
    def min_delta(self) -> float | None:
        """Amount that an improvement must exceed; ``None`` without a plateau."""
        plateau = self._find(Plateau)
        return None if plateau is None else plateau.min_delta

    @min_delta.setter
    def min_delta(self, value: float) -> None:
        check_number("min_delta", value)
        self._owner(Plateau, "min_delta", value).min_delta = abs(value)  # Lightning's attribute has a sign

    @property
    def wait_count(self) -> int:
        """Number of validations since the last improvement; 0 without a plateau."""
        plateau = self._find(Plateau)
        return 0 if plateau is None else plateau.wait

    @wait_count.setter
    def wait_count(self, value: int) -> None:
        check_number("wait_count", value, low=0, integer=True)
        self._owner(Plateau, "wait_count", value).wait = value
        self._keep_for_next_fit("wait_count", value)

    @property
    def best_score(self) -> Tensor:
        """Best value of the plateau's metric; NaN without a plateau."""
        plateau = self._find(Plateau)
        return torch.tensor(math.nan if plateau is None else plateau.best)

    @best_score.setter
    def best_score(self, value: Tensor | float) -> None:
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not isinstance(number, int | float) or math.isnan(number):
            raise ValueError(f"`best_score` must be a number, which may be infinite, got {value!r}")
        self._owner(Plateau, "best_score", value).best = float(number)
        self._keep_for_next_fit("best_score", value)

    def _keep_for_next_fit(self, attribute: str, value: Any) -> None:
        """Keep a value that is set between fits, so that the next fit starts with it after its reset."""
        if self.fit is None:
            self._before_fit[attribute] = value

    # ---- the other criteria ------------------------------------------------------------------------------------------

    @property
    def check_finite(self) -> bool:
        """True to stop when the metric is NaN or infinite."""
        return self._find(NonFinite) is not None

    @check_finite.setter
    def check_finite(self, value: bool) -> None:
        if bool(value) != self.check_finite:
            self._add_or_remove(NonFinite, "check_finite", bool(value))

    @property
    def stopping_threshold(self) -> float | None:
        """Value at which training stops as soon as the metric is better; ``None``: off."""
        threshold = self._find(Threshold)
        return None if threshold is None else threshold.value

    @stopping_threshold.setter
    def stopping_threshold(self, value: float | None) -> None:
        self._set_bound(Threshold, "stopping_threshold", value)

    @property
    def divergence_threshold(self) -> float | None:
        """Value at which training stops as soon as the metric is worse; ``None``: off."""
        divergence = self._find(Divergence)
        return None if divergence is None else divergence.value

    @divergence_threshold.setter
    def divergence_threshold(self, value: float | None) -> None:
        self._set_bound(Divergence, "divergence_threshold", value)

    # ---- parts of the criterion -------------------------------------------------------------------------------------

    def _alternatives(self) -> list[Criterion]:
        return self.criterion.criteria if isinstance(self.criterion, AnyOf) else [self.criterion]

    def _find(self, kind: type[C]) -> C | None:
        return next((one for one in reversed(self._alternatives()) if isinstance(one, kind)), None)

    def _owner(self, kind: type[C], argument: str, value: Any) -> C:
        one = self._find(kind)
        if one is None:
            raise ValueError(
                f"`{argument}={value!r}` belongs to a {kind.__name__}, which {self.criterion!r} does not have"
            )
        return one

    def _set_bound(self, kind: type[Threshold | Divergence], argument: str, value: float | None) -> None:
        """Set the bound of one kind of criterion; add it if it is missing, remove it for ``None``."""
        if value is not None:
            check_number(argument, value)
        old = self._find(kind)
        if old is not None and value is not None:
            old.value = value
        elif old is not None or value is not None:
            self._add_or_remove(kind, argument, value, value, self.mode)

    def _add_or_remove(
        self, kind: type[NonFinite | Threshold | Divergence], argument: str, value: Any, *arguments: Any
    ) -> None:
        """Add a criterion of this kind, made from the metric and ``arguments``; remove it if ``value`` is off."""
        if isinstance(self._monitor, Criterion) or not isinstance(self.criterion, AnyOf):
            raise ValueError(f"`{argument}={value!r}` belongs to the criterion: pass it to {self._monitor!r}")
        criteria = [one for one in self.criterion.criteria if not isinstance(one, kind)]
        if value is not None and value is not False:
            criteria.append(kind(self._monitor, *arguments))
        self.criterion.criteria = sorted(criteria, key=lambda one: _ORDER.index(type(one)))


def _best(by: Any, mode: Any, criterion: Criterion | None) -> Best:
    return Best(by, modes_of_best(by, mode, {} if criterion is None else directions(criterion)))


def check_best(criterion: Criterion, best_by: object, restore_best: bool) -> None:
    """Raise if the criterion reads several metrics and none is named by which weights are the best."""
    if restore_best and best_by is None and len(set(criterion.monitors)) > 1:
        raise ValueError(
            f"`best_by=None` leaves open which of {criterion.monitors} decides which weights are best: pass the name of"
            " a metric, a weighted sum {metric: weight} or a list in order of rank; or `restore_best=False`."
        )


def criterion_of(
    monitor: str | Criterion, mode: Mode, check_finite: bool, plateau: dict[str, Any], bounds: dict[str, float | None]
) -> Criterion:
    """Return the criterion for the arguments of :class:`~lightning_optim.EarlyStopping`.

    Raises:
        ValueError: If ``monitor`` is a criterion, and an argument of the plateau or a bound is passed beside it, or if
            a bound is not a finite number.
    """
    check_early_stopping_monitor(monitor, mode=mode, **plateau)
    if isinstance(monitor, Criterion):
        monitor.check_complete()
        defaults = {
            "patience": DEFAULT_PATIENCE,
            "min_delta": 0.0,
            "stopping_threshold": None,
            "divergence_threshold": None,
        }
        for argument, value in {**plateau, **bounds}.items():
            if value != defaults[argument]:
                raise ValueError(f"`{argument}={value!r}` belongs to the criterion: pass it to {monitor!r}")
        return monitor
    criteria: list[Criterion] = [NonFinite(monitor)] if check_finite else []
    for kind, (argument, value) in zip((Threshold, Divergence), bounds.items(), strict=True):
        criteria += [] if value is None else [kind(monitor, check_number(argument, value), mode)]
    return AnyOf([*criteria, Plateau(monitor, mode=mode, **plateau)])
