"""Store in an averaged checkpoint the list of its source checkpoints, in plain values beside the weights."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from lightning_optim.runtime.files import safe_reading

KEY = "lightning_optim_average"
"""Name of the entry in a checkpoint and in safetensors' metadata; of the attribute of a state dict without entries."""

_DEPTH = 4  # averages of averages of …, so that a chain of them does not grow
_FILES, _LINES = 1000, 100


@dataclass(frozen=True)
class Source:
    """A checkpoint that an average is made of.

    Attributes:
        file: Its name, without the folders that all have in common.
        weight: Its share, from 0 to 1.
        average: Sources of this checkpoint, if it is known to be an average itself; else ``None``.
    """

    file: str
    weight: float
    average: Provenance | None = None


@dataclass(frozen=True)
class Provenance:
    """Tell of which checkpoints weights are the mean.

    Attributes:
        sources: The checkpoints, in the order in which they were averaged.
        score: The score of a greedy soup; ``None`` for a plain mean.
        tried: Number of checkpoints that a greedy soup tried; ``None`` for a plain mean, or if it is not known.
    """

    sources: tuple[Source, ...]
    score: float | None = None
    tried: int | None = None

    @property
    def is_mean(self) -> bool:
        """True if more than one checkpoint is in it: a soup may keep one alone, and a mean may be of one."""
        used = [source for source in self.sources if source.weight]
        return len({source.file for source in used}) > 1 or any(one.average and one.average.is_mean for one in used)

    def as_plain_values(self, depth: int = _DEPTH) -> dict[str, Any]:
        """Return the dictionary that is written into a checkpoint."""
        files = [
            {
                "file": source.file,
                "weight": source.weight,
                "average": source.average.as_plain_values(depth - 1) if source.average and depth > 1 else None,
            }
            for source in self.sources
        ]
        tried = {} if self.tried is None else {"tried": self.tried}
        return {"version": 1, "files": files, "score": self.score, **tried}

    def lines(self) -> Iterator[str]:
        """Yield what ``lightning-optim inspect`` prints; of very many files the first."""
        yield from itertools.islice(self._lines("", ""), _LINES)

    def _lines(self, before: str, indent: str) -> Iterator[str]:
        count = len(self.sources) if self.tried is None else self.tried
        number = f"{count} file{'s' if count != 1 else ''}"
        if self.tried is not None:
            number = f"{len(self.sources)} of {number}"
        if self.score is not None:
            kind = f"a greedy soup of {number}, score {self.score:.6g}"
        else:
            kind = f"the mean of {number}" if len(self.sources) > 1 else f"a copy of {number}"
        yield f"{before}{kind}:"
        for source in self.sources:
            begin = f"{indent}  {source.weight:.4g} * {source.file}"
            if source.average is None:
                yield begin
            else:
                yield from source.average._lines(f"{begin}, which is ", f"{indent}  ")


def provenance_of(
    paths: Sequence[str],
    weights: Sequence[float],
    averages: Sequence[Provenance | None],
    score: float | None = None,
    tried: Sequence[str] | None = None,
) -> Provenance:
    """Return the provenance of a mean.

    Args:
        paths: Paths of the checkpoints.
        weights: Their weights, not all zero.
        averages: The provenance of each.
        score: The score of a greedy soup.
        tried: Paths of all checkpoints that a greedy soup tried, from which its own are told apart.
    """
    all_paths = list(dict.fromkeys([*paths, *(tried or ())]))
    names = dict(zip(all_paths, short_names(all_paths), strict=True))
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    sources = map(Source, [names[path] for path in paths], shares, averages)
    return Provenance(tuple(sources), score, None if tried is None else len(tried))


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the ends of paths by which they can be told apart, without a machine's folders.

    Example::

        >>> short_names(["/runs/1/last.ckpt", "/runs/2/last.ckpt"]), short_names(["/runs/a.ckpt", "b.ckpt"])
        (['1/last.ckpt', '2/last.ckpt'], ['a.ckpt', 'b.ckpt'])
    """
    parts = [PurePath(os.path.abspath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        ends = ["/".join(one[-length:]) for one in parts]
        if len({*ends}) == len({*parts}):
            break
    return ends if parts else []


def read_provenance(path: str, loaded: Mapping[Any, Any]) -> Provenance | None:
    """Return of what a loaded checkpoint is the mean; ``None`` if it does not say so.

    Args:
        path: Its path. The metadata of a local safetensors file are read from it.
        loaded: Its content.
    """
    if safe_reading.is_safetensors(path):
        return _parsed(_in_metadata(path))
    return _parsed(loaded.get(KEY) if KEY in loaded else getattr(loaded, KEY, None))


def with_provenance(weights: Mapping[Any, Any], provenance: Provenance) -> OrderedDict[Any, Any]:
    """Return a state dict that remembers its provenance in an attribute, and has no name that a module does not know.

    ``torch.save`` keeps attributes of this class, as it does for the versions of modules.
    """
    state = OrderedDict(weights)
    setattr(state, KEY, provenance.as_plain_values())
    return state


def _in_metadata(path: str) -> Any:
    if not os.path.isfile(path):
        return None
    try:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(KEY, "null"))
    except Exception:  # any error of a format that the reader of the weights has accepted or refused before
        return None


def _parsed(value: Any, depth: int = _DEPTH) -> Provenance | None:
    """Return the provenance in what a file holds, which may be anything."""
    try:
        files = value["files"][:_FILES]
        sources = [Source(str(one["file"])[:300], float(one["weight"]), _inner(one, depth)) for one in files]
        score = None if value["score"] is None else float(value["score"])
        tried = None if value.get("tried") is None else int(value["tried"])
        is_right = bool(sources) and all(math.isfinite(one.weight) for one in sources) and (tried or 0) < 1 << 32
        return Provenance(tuple(sources), score, tried) if is_right else None
    except Exception:
        return None


def _inner(one: Mapping[str, Any], depth: int) -> Provenance | None:
    return _parsed(one.get("average"), depth - 1) if depth > 1 else None
