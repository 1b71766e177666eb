"""Name terms for the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

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


def names_beside(callback: Any, kind: type, callbacks: Sequence[Any]) -> list[str]:
    """Return the names of a callback's terms, of which none is that of another callback's term.

    Args:
        callback: The callback, with its ``terms``.
        kind: Its class, whose callbacks log under the same names.
        callbacks: Those of the Trainer.
    """
    alike: list[Any] = [other for other in callbacks if isinstance(other, kind)]
    owners = [other for other in alike for _ in other.terms]
    names = names_of(term for other in alike for term in other.terms)
    return [name for name, owner in zip(names, owners, strict=True) if owner is callback]
