"""Find out which direction of each metric is the better one: from the criteria that read it, or from ``mode``."""

from __future__ import annotations

from typing import Any

from lightning_optim.base.metric_names import mode_of
from lightning_optim.stopping.combined_criteria import AtLeast
from lightning_optim.stopping.criteria import Criterion
from lightning_optim.stopping.improvement import Best, Mode, mode_argument

By = str | dict[str, float] | list[str]


def directions(criterion: Criterion) -> dict[str, Mode]:
    """Return the mode of each metric that a criterion states one for.

    A metric is left out if nothing states its mode, as with :class:`NonFinite`, or if two criteria disagree.

    Example::

        >>> from lightning_optim.stopping.criteria import NonFinite, Plateau
        >>> directions(AtLeast(1, [NonFinite("norm"), Plateau("loss"), Plateau("accuracy", mode="max")]))
        {'loss': 'min', 'accuracy': 'max'}
    """
    stated: dict[str, set[Mode]] = {}
    for one in single_criteria(criterion):
        mode = getattr(one, "mode", None)
        if mode in ("min", "max") and len(one.monitors) == 1:
            stated.setdefault(one.monitors[0], set()).add(mode)
    return {name: modes.pop() for name, modes in stated.items() if len(modes) == 1}


def single_criteria(criterion: Criterion) -> list[Criterion]:
    """Return the criteria in combined ones, in their order; of any other criterion itself."""
    if not isinstance(criterion, AtLeast):
        return [criterion]
    return [single for one in criterion.criteria for single in single_criteria(one)]


def modes_of_best(by: Any, mode: Any, stated: dict[str, Mode]) -> Any:
    """Return the modes with which ``best_by`` compares: those that the criteria state, and ``mode`` for other metrics.

    Args:
        by: The argument ``best_by``.
        mode: The argument ``mode``: one for all metrics, which counts as not passed if it is ``"min"``, the default; or
            a list of one for each. Of a weighted sum it is the mode of the sum.
        stated: The mode of each metric that a criterion states one for.

    Raises:
        ValueError: If ``mode``, or the sign of a weight, contradicts a criterion.

    Example::

        >>> modes_of_best(["accuracy", "loss", "time"], "min", {"accuracy": "max", "loss": "min"})
        ['max', 'min', 'min']
        >>> modes_of_best("accuracy", "min", {"accuracy": "max"})
        'max'
    """
    if isinstance(by, dict):
        _check_signs(by, mode, stated)
        return mode
    names = by if isinstance(by, list) else [by]
    given = mode if isinstance(mode, list) else [mode] * len(names)
    if len(given) != len(names) or not all(isinstance(name, str) for name in names):
        return mode  # an error, which the comparison raises
    if not all(one in ("min", "max") for one in given):
        return mode  # an error too
    found = [stated.get(name, one) for name, one in zip(names, given, strict=True)]
    contradictions = {
        name: right
        for name, one, right in zip(names, given, found, strict=True)
        if one != right and (one == "max" or isinstance(mode, list))
    }
    if contradictions:
        told = " and ".join(f"that {name!r} is best at its {right}imum" for name, right in contradictions.items())
        raise ValueError(
            f"`mode={mode!r}` contradicts the criteria, which say {told}: leave out `mode`, since `best_by={by!r}`"
            f" takes the modes of the criteria, here {found}."
        )
    return found if isinstance(by, list) else found[0]


def check_mode(mode: Mode, criterion: Criterion) -> None:
    """Raise if a ``mode`` that is not the default is passed beside a criterion for which it would have no effect."""
    stated = directions(criterion)
    if mode == "max" and stated and "max" not in stated.values():
        raise ValueError(f"`mode={mode!r}` belongs to the criterion: pass it to {criterion!r}")


def why_unlikely(monitor: str | Criterion, criterion: Criterion, best: Best | None) -> str:
    """Return a sentence if a metric is minimized whose name says that larger is better, or the reverse; else empty.

    Args:
        monitor: The argument of :class:`~lightning_optim.EarlyStopping`.
        criterion: The criterion that was made from it.
        best: What decides which weights are the best, if it is not the criterion.
    """
    found: dict[str, tuple[Mode, str]] = {}
    for one in single_criteria(criterion):
        for name in one.monitors if len(one.monitors) == 1 else ():
            right = mode_of(name)
            if right and getattr(one, "mode", right) != right:
                way = f"write EarlyStopping({name!r}, mode={right!r})"
                found.setdefault(name, (right, way if monitor == name else f"pass `mode={right!r}` to {one!r}"))
    for name, mode in ({} if best is None else _modes_in(best)).items():
        right = mode_of(name)
        if best is not None and right and mode != right:
            found.setdefault(name, (right, _way_of_best(monitor, best)))
    told = [
        f"the {'largest' if right == 'min' else 'smallest'} value of {name!r} as the best, but its name says that"
        f" {'smaller' if right == 'min' else 'larger'} is better: {way}"
        for name, (right, way) in found.items()
    ]
    return f"EarlyStopping takes {'; and '.join(told)}." if told else ""


def _modes_in(best: Best) -> dict[str, Mode]:
    """Return the mode of each metric by which weights are the best."""
    if isinstance(best.by, dict):
        return {name: mode_in_sum(weight, best.modes[0]) for name, weight in best.by.items() if weight}
    return dict(zip(best.monitors, best.modes, strict=True))


def _way_of_best(monitor: str | Criterion, best: Best) -> str:
    """Return what to write in the place of a direction of ``best_by`` that a metric's name contradicts."""
    if isinstance(best.by, dict):
        return f"change the sign of its weight in `best_by={best.by!r}`"
    modes = [mode_of(name) or mode for name, mode in _modes_in(best).items()]
    first = f"Plateau({monitor!r}{mode_argument(monitor)})" if isinstance(monitor, str) else "…"
    return f"write EarlyStopping({first}, best_by={best.by!r}, mode={modes if len(modes) > 1 else modes[0]!r})"


def mode_in_sum(weight: float, mode: Mode) -> Mode:
    """Return the mode of a metric with this weight in a weighted sum of this mode."""
    return mode if weight >= 0 else "max" if mode == "min" else "min"


def _check_signs(weights: dict[str, float], mode: Any, stated: dict[str, Mode]) -> None:
    """Raise if a weighted sum that is best at its ``mode`` wants a metric the other way than its criterion."""
    numbers = [weight for weight in weights.values() if isinstance(weight, int | float)]
    if mode not in ("min", "max") or len(numbers) < len(weights):
        return  # an error, which the comparison raises
    wanted = {name: mode_in_sum(weight, mode) for name, weight in weights.items() if weight}
    wrong = [name for name, its_mode in wanted.items() if stated.get(name, its_mode) != its_mode]
    if not wrong:
        return
    if len(wrong) == len(wanted):
        line = f"mode={('max' if mode == 'min' else 'min')!r}"
    else:
        line = f"best_by={ {name: -weight if name in wrong else weight for name, weight in weights.items()} }"
    told = " and ".join(f"{name!r} is best at its {stated[name]}imum" for name in wrong)
    raise ValueError(
        f"`best_by={weights!r}`, a sum that is best at its {mode}imum, contradicts the criteria, which say that {told}:"
        f" write {line}"
    )
