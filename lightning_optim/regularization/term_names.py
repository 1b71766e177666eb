"""Name terms for the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lightning_optim.base.policy import ParameterPolicy


def names_of(terms: Iterable[ParameterPolicy]) -> list[str]:
    """Return the name of each term for the log, with a number from the second term of a name on.

    Example::

        >>> from lightning_optim import L1, L2
        >>> names_of([L1(0.1), L2(0.1), L1(0.2)])
        ['l1', 'l2', 'l1_2']
    """
    seen: Counter[str] = Counter()
    names = []
    for term in terms:
        kind = term.log_name
        seen[kind] += 1
        names.append(kind if seen[kind] == 1 else f"{kind}_{seen[kind]}")
    return names
