"""Greedy soups: the mean of those models that do not make it worse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning_optim.averaging.checkpoints import reading
from lightning_optim.averaging.checkpoints.average_checkpoints import Path, RunningMean, StateDict, listed, shown


class Soup(dict[str, Any]):
    """The ``state_dict`` of a soup.

    Attributes:
        kept: The files in it, the best first.
        score: Its score.
    """

    kept: list[str]
    score: float


def greedy_soup(
    paths: Sequence[Path],
    score: Callable[[StateDict], float],
    *,
    mode: str = "max",
    scores: Sequence[float] | None = None,
    barrier: float | None = 0.1,
    key: str | None = None,
    weights_only: bool = True,
    progress: bool = False,
) -> Soup:
    r"""The mean of those models that do not make it worse (arXiv:2203.05482).

    The files are sorted by score, the best first. Each in turn is added to the mean, :math:`(n s + \theta) / (n + 1)`
    in fp32, and stays if the score of the mean does not fall. So the soup is at least as good as the best model, on the
    data that the score is taken from: choose on validation data, and report on others. Memory is three models.

    Args:
        paths: The files, as for :func:`average_checkpoints`.
        score: A ``state_dict`` to a number. A model with BatchNorm should estimate its statistics anew in here, for
            single models and means alike.
        mode: ``"max"`` if more is better, ``"min"`` if less is.
        scores: The models' own scores, if they are known; else each is scored.
        barrier: The guard. Models that share no basin have a mean that is worth nothing, whatever is added: if the
            midpoint of the best two is worse than the mean of their scores by more than this share of it, the soup is
            refused. ``None``: no guard.
        key: Under which name the weights lie, as for :func:`average_checkpoints`.
        weights_only: Read nothing but tensors and plain values.
        progress: Show a bar.

    Raises:
        ValueError: If the best two share no basin, a score is not finite, or an argument does not fit.

    Example::

        >>> import os, tempfile, torch
        >>> paths = [os.path.join(tempfile.mkdtemp(), f"{value}.pt") for value in (1.0, 2.0, 9.0)]
        >>> for path, value in zip(paths, (1.0, 2.0, 9.0)):
        ...     torch.save({"weight": torch.tensor([value])}, path)
        >>> soup = greedy_soup(paths, lambda state: (state["weight"].item() - 1.6) ** 2, mode="min", barrier=None)
        >>> soup["weight"], len(soup.kept)
        (tensor([1.5000]), 2)
    """
    if mode not in ("min", "max"):
        raise ValueError(f'`mode` must be "min" or "max", got {mode!r}')
    names = listed(paths)
    if not names or (scores is not None and len(scores) != len(names)):
        raise ValueError(f"`paths` must name files, and `scores`, if given, one for each; got {names} and {scores!r}")

    def read(name: str) -> StateDict:
        return reading.weights_in(name, weights_only, key)

    known = [float(score(read(n))) for n in shown(names, len(names), progress)] if scores is None else list(scores)
    return greedy_mean(known, names, read, score, mode, barrier, progress)


def greedy_mean(
    scores: Sequence[float],
    names: Sequence[str],
    read: Callable[[str], StateDict],
    score: Callable[[StateDict], float],
    mode: str,
    barrier: float | None,
    progress: bool = False,
) -> Soup:
    """:func:`greedy_soup` of what ``read`` returns for each name, with known scores.

    What ``score`` changes in the state dict that it gets, such as statistics, is in the soup.
    """
    if not all(math.isfinite(value) for value in scores):
        raise ValueError(f"scores must be finite, got {list(scores)}")
    sign = 1.0 if mode == "max" else -1.0
    ranked = sorted(zip(scores, names, strict=True), key=lambda pair: -sign * pair[0])
    best, first = ranked[0]
    mean, kept = RunningMean(), [first]
    mean.add(read(first), label=first)
    soup = mean.result()
    for position, (value, name) in enumerate(shown(ranked[1:], len(ranked) - 1, progress)):
        candidate = copy.copy(mean)
        candidate.add(read(name), label=name)
        mixed = candidate.result()
        its_score = float(score(mixed))
        if position == 0:
            _guard((best + value) / 2.0, its_score, sign, barrier, first, name)
        if sign * its_score >= sign * best:
            mean, soup, best = candidate, mixed, its_score
            kept.append(name)
    result = Soup(soup)
    result.kept, result.score = kept, best
    return result


def _guard(ends: float, middle: float, sign: float, barrier: float | None, one: str, other: str) -> None:
    fall = sign * (ends - middle)
    if barrier is not None and not fall <= barrier * abs(ends):
        raise ValueError(
            f"{one} and {other} share no basin: their midpoint scores {middle:g}, they themselves {ends:g} on average."
            " A mean of weights suits moments of one run, or models fine-tuned from one start; average the predictions"
            " of others (`Ensemble`), or pass `barrier=None`."
        )
