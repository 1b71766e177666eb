"""Check constructor arguments: one sentence for each error, with the name, the value and the allowed range."""

from __future__ import annotations

import math
import numbers
from typing import Any, TypeVar, get_args

T = TypeVar("T")


def check_number(
    name: str,
    value: T,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    high_open: bool = False,
    integer: bool = False,
    schedule: bool = False,
) -> T:
    """Check that an argument is a number in its range, and return it; the error names value and allowed range.

    A ``bool`` is not a number, and NaN is in no range. Without ``low`` and ``high`` a number must be finite; infinity
    is allowed where ``high=math.inf`` says so.

    Args:
        name: The argument's name, for the message.
        value: The argument.
        low: The smallest number allowed.
        high: The largest number allowed.
        low_open: Exclude ``low`` itself.
        high_open: Exclude ``high`` itself.
        integer: Allow integers only.
        schedule: Also allow a :class:`~lightning_optim.Schedule`. Its ``bounds`` are checked if it knows them.

    Returns:
        ``value``.

    Raises:
        ValueError: If ``value`` is not allowed.

    Example::

        >>> check_number("decay", 1.5, low=0.0, high=1.0, high_open=True)
        Traceback (most recent call last):
            ...
        ValueError: `decay` must be a number in [0.0, 1.0), got 1.5
    """

    def allowed(number: Any) -> bool:
        if isinstance(number, bool) or not isinstance(number, numbers.Integral if integer else numbers.Real):
            return False
        value = float(number)
        above = -math.inf < value if low is None else (low < value if low_open else low <= value)
        below = value < math.inf if high is None else (value < high if high_open else value <= high)
        return above and below

    if schedule and callable(value) and not isinstance(value, type) and hasattr(value, "bounds"):
        bounds: tuple[float, float] | None = value.bounds
        good = bounds is None or all(map(allowed, bounds))
    else:
        good = allowed(value)
    if not good:
        kind = "an integer" if integer else "a number"
        kind += " (or a schedule of them)" if schedule else ""
        raise ValueError(f"`{name}` must be {kind} {_range(low, high, low_open, high_open)}, got {value!r}")
    return value


def check_choice(name: str, value: T, choices: Any) -> T:
    """Check that an argument is one of the values of a ``Literal``, and return it; the error names what is allowed.

    Args:
        name: The argument's name, for the message.
        value: The argument.
        choices: The ``Literal`` that the signature has, so that signature and check cannot differ.

    Returns:
        ``value``.

    Raises:
        ValueError: If ``value`` is not allowed.

    Example::

        >>> from typing import Literal
        >>> check_choice("mode", "largest", Literal["min", "max"])
        Traceback (most recent call last):
            ...
        ValueError: `mode` must be one of 'min', 'max', got 'largest'
    """
    allowed = get_args(choices)
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _range(low: float | None, high: float | None, low_open: bool, high_open: bool) -> str:
    if low is None and high is None:
        return "that is finite"
    if low is None:
        return f"{'<' if high_open else '<='} {high}"
    if high is None or high == math.inf:
        return f"{'>' if low_open else '>='} {low}"
    return f"in {'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"
