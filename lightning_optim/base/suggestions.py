"""Answer a name that does not exist with the nearest one that does, for a message."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

_NEAR = 0.75  # similarity in [0, 1]: "val_los" is near to "val_loss", and "train_loss" is not


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean '…'?" with the known name that is most similar; empty if none is near.

    A name is near if few letters differ, upper and lower case being the same, or if one of the two has all words of the
    other.

    Args:
        name: The name that does not exist.
        known: The names that exist.

    Example::

        >>> nearest("val_los", ["epoch", "train_loss", "val_loss"]), nearest("acc", ["loss", "val_acc"])
        ("; did you mean 'val_loss'?", "; did you mean 'val_acc'?")
        >>> nearest("val_loss", ["epoch", "val_acc", "train_loss"])
        ''
    """
    return did_you_mean(nearest_name(name, known))


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return the known name that is nearest, as :func:`nearest` finds it; empty if none is near."""
    return _most_similar(name, [one for one in known if _is_near(name, one)])


def did_you_mean(name: str) -> str:
    """Return the end of a message that suggests a name; empty without a name."""
    return f"; did you mean {name!r}?" if name else ""


def nearest_pattern(pattern: str, known: Iterable[str]) -> str:
    """Return what :func:`nearest` does for a glob: the most similar glob that matches a known name.

    Example::

        >>> known = ["encoder.0.weight", "encoder.0.bias", "head.weight"]
        >>> nearest_pattern("encodr.*", known), nearest_pattern("encoder", known), nearest_pattern("body.*", known)
        ("; did you mean 'encoder.*'?", "; did you mean 'encoder.*'?", '')
        >>> nearest_pattern("head.*.weight", known)
        "; did you mean 'head.weight'?"
    """
    names = list(dict.fromkeys(known))
    parts = pattern.split(".")
    if not any(letter in pattern for letter in "*?["):
        inside = f"{pattern}.*"  # the name of a module, in the place of the names of what is in it
        return did_you_mean(inside) if fnmatch.filter(names, inside) else nearest(pattern, names)
    # Without a part `*`: a pattern for what is within a module, where the module is a single layer.
    candidates = {".".join(parts[:index] + parts[index + 1 :]) for index, part in enumerate(parts) if part == "*"}
    for index, part in enumerate(parts):
        if any(letter in part for letter in "*?["):
            continue
        # A wildcard may stand for several parts: those before it are counted from the front, those after it from the
        # end.
        for theirs in (name.split(".") for name in names):
            for place in (index, index - len(parts)):
                if -len(theirs) <= place < len(theirs) and _is_near(part, theirs[place]):
                    candidates.add(".".join([*parts[:index], theirs[place], *parts[index + 1 :]]))
    return did_you_mean(_most_similar(pattern, sorted(one for one in candidates if fnmatch.filter(names, one))))


def shown(names: Iterable[str], most: int = 8) -> str:
    """Return a list of names for a message; of a long one the first names, and how many there are.

    Example::

        >>> shown(["loss", "accuracy"]), shown(["a", "b", "c", "d"], most=2), shown([])
        ("'loss', 'accuracy'", "'a', 'b', … (4 in all)", 'none')
    """
    listed = list(names)
    cut = f", … ({len(listed)} in all)" if len(listed) > most else ""
    return (", ".join(map(repr, listed[:most])) + cut) or "none"


def _most_similar(name: str, near: Sequence[str]) -> str:
    return max(near, key=lambda one: _similarity(name, one)) if near else ""


def _is_near(name: str, other: str) -> bool:
    words, others = _words(name), _words(other)
    return bool(words and others and (words <= others or others <= words)) or _similarity(name, other) >= _NEAR


def _similarity(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))
