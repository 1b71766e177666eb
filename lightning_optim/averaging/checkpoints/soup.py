"""Greedy soups: average those of several models that do not make the average worse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

from lightning_optim.averaging.checkpoints import reading
from lightning_optim.averaging.checkpoints.average_checkpoints import PathLike, listed, shown
from lightning_optim.averaging.checkpoints.provenance import Provenance, provenance_of
from lightning_optim.averaging.checkpoints.running_mean import RunningMean, StateDict
from lightning_optim.averaging.checkpoints.writing import check_ending, write_average
from lightning_optim.base.arguments import check_choice

Mode: TypeAlias = Literal["min", "max"]
Report: TypeAlias = Callable[[str, float, bool | None, bool], None]
"""A function of a path, a score, whether the checkpoint stays in the soup (``None``: it was scored alone), and whether
it is the first one in it."""


class Tried(NamedTuple):
    """Tell of a checkpoint that was tried.

    Attributes:
        path: Its path.
        score: Score of the soup with it.
        kept: True if it stayed in the soup.
    """

    path: str
    score: float
    kept: bool


class Soup(dict[str, Any]):
    """Hold the ``state_dict`` of a soup.

    Attributes:
        kept: Paths of the checkpoints in it, the best first.
        score: Score of the soup.
        tried: A :class:`Tried` for each checkpoint, in the order in which they were tried: the best one first, with its
            own score.
    """

    kept: list[str]
    score: float
    tried: list[Tried]
    _averages: Mapping[str, Provenance | None] = MappingProxyType({})
    _key: str | None = None
    _weights_only: bool = True

    def save(self, path: PathLike) -> None:
        """Write a checkpoint with the soup, as ``lightning-optim average`` does; ``lightning-optim inspect`` knows it.

        It is a copy of the checkpoint that was added last, without the state of its training: of a Lightning checkpoint
        one that ``load_from_checkpoint`` reads. A ``.safetensors`` file has the weights alone. An existing file is
        overwritten.

        Args:
            path: A name that ends in ``.ckpt``, ``.pt``, ``.pth`` or ``.safetensors``.

        Raises:
            ValueError: If the path has another ending, or the format cannot hold the weights.
            OSError: If a checkpoint of the soup is gone, or the file cannot be written.
        """
        self._write(check_ending(path))

    def _write(self, path: str) -> list[str]:
        """Write the checkpoint; return the names of entries that were left out."""
        averages = [self._averages.get(one) for one in self.kept]
        tried = [one.path for one in self.tried]
        provenance = provenance_of(self.kept, [1.0] * len(self.kept), averages, self.score, tried)
        return write_average(dict(self), path, provenance, self.kept[-1], self._key, self._weights_only)


def greedy_soup(
    paths: Sequence[PathLike],
    score: Callable[[StateDict], float],
    *,
    mode: Mode = "max",
    scores: Sequence[float] | None = None,
    barrier: float | None = 0.1,
    key: str | None = None,
    weights_only: bool = True,
    progress: bool = False,
) -> Soup:
    r"""Average those of several fine-tuned models that do not make the average worse.

    The models are sorted by score, the best first. Each in turn is added to the soup, :math:`(n s + \theta) / (n + 1)`
    in fp32, and stays in it if the score does not get worse. So the soup is at least as good as the best model on the
    data of the score: use the validation set for it, and report results on a test set. The method is that of
    `arXiv:2203.05482 <https://arxiv.org/abs/2203.05482>`_. It holds three models in memory.

    Args:
        paths: Paths of the checkpoints, as for :func:`average_checkpoints`.
        score: Function from a ``state_dict`` to a number, such as the accuracy on the validation set. For a model with
            BatchNorm call :func:`refresh_batchnorm_` in it. What it writes into the ``state_dict``, such as these
            statistics, is in the soup.
        mode: ``"max"`` (default) if a higher score is better, ``"min"`` if a lower one is.
        scores: Scores of the single models, if they are known. Default: compute them with ``score``.
        barrier: Largest allowed loss of score at the midpoint of the best two models, as a share of the mean of their
            scores. Default 0.1. If it is exceeded, the two are not linearly mode-connected, and no average of such
            models is useful. ``None`` turns the test off.
        key: Name of the weights in each checkpoint, as for :func:`average_checkpoints`.
        weights_only: If True, read only tensors and plain values.
        progress: If True, show a progress bar.

    Returns:
        The ``state_dict`` of the soup, with the attributes ``kept``, ``score`` and ``tried`` and the method
        ``save(path)``.

    Raises:
        ValueError: If the best two exceed the barrier, a score is not finite, or an argument is not allowed.

    Example::

        >>> import os, tempfile, torch
        >>> paths = [os.path.join(tempfile.mkdtemp(), f"{value}.pt") for value in (1.0, 2.0, 9.0)]
        >>> for path, value in zip(paths, (1.0, 2.0, 9.0)):
        ...     torch.save({"weight": torch.tensor([value])}, path)
        >>> soup = greedy_soup(paths, lambda state: (state["weight"].item() - 1.6) ** 2, mode="min", barrier=None)
        >>> soup["weight"], len(soup.kept)
        (tensor([1.5000]), 2)

    ``Trainer(callbacks=[ModelCheckpoint(monitor="val_loss", save_top_k=5), CheckpointAveraging(5, greedy=True)])``
    makes a soup of the best checkpoints of a run.
    """
    return make_soup(paths, score, mode, scores, barrier, key, weights_only, progress)


def make_soup(
    paths: Sequence[PathLike],
    score: Callable[[StateDict], float],
    mode: Mode = "max",
    scores: Sequence[float] | None = None,
    barrier: float | None = 0.1,
    key: str | None = None,
    weights_only: bool = True,
    progress: bool = False,
    report: Report | None = None,
    notice: reading.Notice | None = None,
) -> Soup:
    """Return the :func:`greedy_soup`; ``report`` hears of each score at once, ``notice`` of each checkpoint."""
    check_choice("mode", mode, Mode)
    names = listed(paths)
    if not names or (scores is not None and len(scores) != len(names)):
        raise ValueError(f"`paths` must not be empty, and `scores` must have one for each; got {names} and {scores!r}")
    averages: dict[str, Provenance | None] = {}

    def read(name: str) -> StateDict:
        weights, averages[name] = reading.weights_and_provenance(name, weights_only, key, notice=notice)
        return weights

    def alone(name: str) -> float:
        found = float(score(read(name)))
        if report is not None:
            report(name, found, None, False)
        return found

    known = [alone(name) for name in shown(names, len(names), progress)] if scores is None else list(scores)
    soup = greedy_mean(known, names, read, score, mode, barrier, progress, report)
    soup._averages, soup._key, soup._weights_only = averages, key, weights_only
    return soup


def greedy_mean(
    scores: Sequence[float],
    names: Sequence[str],
    read: Callable[[str], StateDict],
    score: Callable[[StateDict], float],
    mode: Mode,
    barrier: float | None,
    progress: bool = False,
    report: Report | None = None,
) -> Soup:
    """Compute the :func:`greedy_soup` of the state dicts that ``read`` returns for ``names``, from known scores.

    Changes that ``score`` makes in the state dict that it gets, such as BatchNorm statistics, are in the soup.
    """
    if not all(math.isfinite(value) for value in scores):
        raise ValueError(f"`scores` must be finite, got {list(scores)}")
    sign = 1.0 if mode == "max" else -1.0
    ranked = sorted(zip(scores, names, strict=True), key=lambda pair: -sign * pair[0])
    best, first = ranked[0]
    mean, tried = RunningMean(), [Tried(first, best, True)]
    mean.add(read(first), label=first)
    soup = mean.result()
    if report is not None:
        report(*tried[0], True)
    for position, (value, name) in enumerate(shown(ranked[1:], len(ranked) - 1, progress)):
        candidate = copy.copy(mean)
        candidate.add(read(name), label=name)
        mixed = candidate.result()
        its_score = float(score(mixed))
        if position == 0:
            _check_barrier((best + value) / 2.0, its_score, sign, barrier, first, name)
        tried.append(Tried(name, its_score, sign * its_score >= sign * best))
        if report is not None:
            report(*tried[-1], False)
        if tried[-1].kept:
            mean, soup, best = candidate, mixed, its_score
    result = Soup(soup)
    result.tried, result.kept, result.score = tried, [one.path for one in tried if one.kept], best
    return result


def _check_barrier(ends: float, middle: float, sign: float, barrier: float | None, one: str, other: str) -> None:
    """Refuse two models whose midpoint scores worse than themselves on average by more than ``barrier``."""
    loss = sign * (ends - middle)
    if barrier is not None and not loss <= barrier * abs(ends):
        raise ValueError(
            f"{one} and {other} are not linearly mode-connected: their midpoint scores {middle:g}, the two themselves"
            f" {ends:g} on average. Average weights of one run, or of models that were fine-tuned from the same"
            " weights; for other models average the predictions (`Ensemble`), or pass `barrier=None`, or"
            " `--no-barrier` to a command."
        )
