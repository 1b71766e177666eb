"""Read the entries by which checkpoints of an ensemble, and of members of ``fit_members``, are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

ENSEMBLE_KEY = "ensemble"
MEMBER_KEY = "fit_members"


def ensemble_entry(checkpoint: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Return the entry that an ensemble wrote; ``None`` if it is missing or damaged."""
    written = checkpoint.get(ENSEMBLE_KEY)
    members = written.get("members") if isinstance(written, dict) else None
    return written if isinstance(members, list) and members and all(map(_is_member_entry, members)) else None


def _is_member_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("class"), str) and isinstance(entry.get("checkpoint"), dict)


def member_label(checkpoint: Mapping[Any, Any]) -> tuple[int, int] | None:
    """Return the seed of the ensemble and the index of a member of ``fit_members``; ``None`` for other checkpoints."""
    label = checkpoint.get(MEMBER_KEY)
    numbers = (label.get("seed"), label.get("index")) if isinstance(label, dict) else ()
    is_label = len(numbers) == 2 and all(type(number) is int and 0 <= number < 1 << 64 for number in numbers)
    return numbers if is_label else None  # type: ignore[return-value]


def describe_entries(checkpoint: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Describe a checkpoint of an ensemble or a member: a line, and the kind of its weights, "" if it is not known."""
    written = ensemble_entry(checkpoint)
    if written is not None:
        names = Counter(entry["class"].rpartition(":")[2].rpartition(".")[2] for entry in written["members"])
        kinds = " and ".join(f"{count} {name}" for name, count in names.items())
        return f"an Ensemble of {kinds}, outputs={str(written.get('outputs'))[:100]}", "weights of the members"
    label = member_label(checkpoint)
    if label is None:
        return None
    about = checkpoint[MEMBER_KEY]
    weights = "weights at the end of its fit" if "weights_of" in about else ""
    if isinstance(writer := about.get("weights_of"), str):
        weights = f"weights of {writer[:300]}"
    return f"member {label[1]} of `fit_members`, seed {label[0]}", weights
