"""Means of the weights of several models or files."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from lightning_optim.averaging import reading
from lightning_optim.averaging.average import kept_dtype
from lightning_optim.averaging.mapped import MappedFile, open_mapped, runs

Path: TypeAlias = str | os.PathLike[str]
StateDict: TypeAlias = dict[str, Any]


def average_weights(
    models_or_state_dicts: Sequence[nn.Module | Mapping[str, Any]], weights: Sequence[float] | None = None
) -> StateDict:
    r"""The weighted mean of several models' weights, :math:`\sum_i w_i \theta_i / \sum_i w_i`.

    Floating and complex tensors are averaged in fp32, or better if they are, and given back in their own dtype;
    integers, bools and whatever else is in a ``state_dict`` are the last model's. Tied weights stay tied. BatchNorm
    statistics are averaged like weights: better ones come from :func:`refresh_batchnorm_`.

    The mean is good if the models share a basin: moments of one run, or fine-tuned from one start. Models that were
    trained from different starts do not, and their mean is worth nothing.

    Args:
        models_or_state_dicts: Modules, or what their ``state_dict()`` returns.
        weights: One number >= 0 for each, not all zero. Default: equal.

    Raises:
        ValueError: If there is nothing to average, names or shapes differ, or the weights do not fit.

    Example::

        >>> one, other = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = [p.data.fill_(v) for model, v in ((one, 1.0), (other, 4.0)) for p in model.parameters()]
        >>> average_weights([one, other], weights=[2, 1])["weight"]
        tensor([[2.]])
    """
    states = [item.state_dict() if isinstance(item, nn.Module) else item for item in models_or_state_dicts]
    mean = RunningMean()
    for index, (state, weight) in enumerate(zip(states, _checked(weights, len(states)), strict=True)):
        mean.add(state, weight, f"model {index}")
    return mean.result()


def average_checkpoints(
    paths: Sequence[Path], weights: Sequence[float] | None = None, *, weights_only: bool = True, progress: bool = False
) -> StateDict:
    r"""The weighted mean of the weights in several files, as :func:`average_weights` of what they hold.

    The files are mapped and read one after the other: memory is the mean in fp32, whatever their number. They may be
    Lightning's checkpoints, of which ``state_dict`` counts (with :class:`WeightAveraging` the averaged weights), plain
    state dicts, ``.safetensors`` files (with ``pip install safetensors``) or folders of a distributed checkpoint.

    Args:
        paths: The files.
        weights: One number >= 0 for each, not all zero. Default: equal.
        weights_only: Read nothing but tensors and plain values: a file from a stranger can run any code otherwise.
        progress: Show a bar.

    Raises:
        ValueError: As :func:`average_weights`, or if a file holds more than tensors and plain values.

    Example::

        >>> import os, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> paths = [os.path.join(folder, f"{value}.pt") for value in (1.0, 4.0)]
        >>> for path, value in zip(paths, (1.0, 4.0)):
        ...     torch.save({"weight": torch.tensor([value])}, path)
        >>> average_checkpoints(paths)
        {'weight': tensor([2.5000])}
    """
    names = [os.fspath(path) for path in paths]
    given = _checked(weights, len(names))
    files = [open_mapped(name) for name in names]
    if _alike(files):
        return _mean_of_mapped(files, given, progress)
    mean = RunningMean()
    for path, weight in shown(zip(names, given, strict=True), len(names), progress):
        mean.add(reading.weights_in(path, weights_only), weight, path)
    return mean.result()


def _checked(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise ValueError("there is nothing to average")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count or not all(math.isfinite(w) and w >= 0.0 for w in given) or sum(given) == 0.0:
        raise ValueError(f"`weights` must be {count} numbers >= 0, not all zero, got {weights!r}")
    return given


class RunningMean:
    """The weighted mean of state dicts that come one after the other, in fp32 or better.

    Attributes:
        total: The sum of the weights so far.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._means: StateDict = {}
        self._ties: dict[str, str] = {}
        self._last: Mapping[str, Any] = {}
        self._label = ""

    @torch.no_grad()
    def add(self, state: Mapping[str, Any], weight: float = 1.0, label: str = "") -> None:
        """Take in one more; its name stands in the error if it does not fit."""
        self.total += weight
        if not self._last:
            self._ties, self._label = ties(state), label
            self._means = {n: _wide(value) for n, value in state.items() if _has_mean(value) and n not in self._ties}
        else:
            _check_like(state, self._last, label, self._label)
            self._untie(ties(state))
            share = weight / self.total if self.total else 0.0
            for name, mean in self._means.items():
                _move_(mean, state[name], share)
        self._last = state

    def _untie(self, now: dict[str, str]) -> None:
        """What is tied in one and not in another has a mean of its own."""
        for name in [name for name, first in self._ties.items() if now.get(name) != first]:
            self._means[name] = self._means[self._ties.pop(name)].clone()

    @torch.no_grad()
    def result(self) -> StateDict:
        """The mean in the dtypes of the last, whose integers and other values it has."""
        means = {name: mean.to(self._last[name].dtype) for name, mean in self._means.items()}
        # The last may be mapped from the disk: what is given back must outlive the file.
        return {
            name: means[self._ties.get(name, name)] if _has_mean(value) else _copied(value)
            for name, value in self._last.items()
        }

    def __copy__(self) -> RunningMean:
        """One that goes on by itself."""
        other = RunningMean()
        other.__dict__.update(self.__dict__)
        other._means = {name: mean.clone() for name, mean in self._means.items()}
        other._ties = dict(self._ties)
        return other


_CHUNK = 1 << 20  # elements of the temporary where dtypes differ


def _move_(mean: Tensor, value: Tensor, share: float) -> None:
    if share == 1.0:
        mean.copy_(value)  # all before had no weight
    elif share and mean.dtype == value.dtype:
        mean.lerp_(value.to(mean.device), share)
    elif share:
        pieces = (torch.split(tensor, _CHUNK) for tensor in (mean.view(-1), value.reshape(-1)))
        for some, other in zip(*pieces, strict=True):
            some.lerp_(other.to(mean.device, mean.dtype), share)


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(kept_dtype(value.dtype), copy=True, memory_format=torch.contiguous_format)


def _has_mean(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def ties(state: Mapping[str, Any]) -> dict[str, str]:
    """The later names of each tensor that has several, to the first."""
    first: dict[Any, str] = {}
    found = {}
    for name, value in state.items():
        if _has_mean(value) and value.numel():
            place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if place in first:
                found[name] = first[place]
            else:
                first[place] = name
    return found


def _check_like(state: Mapping[str, Any], first: Mapping[str, Any], label: str, other: str) -> None:
    if state.keys() != first.keys():
        only = sorted(state.keys() ^ first.keys())
        raise ValueError(f"{label} and {other} have different names: {only[:5]} are in one of them only")
    for name, value in state.items():
        mine, wanted = getattr(value, "shape", None), getattr(first[name], "shape", None)
        if mine != wanted:
            raise ValueError(f"{label} and {other} have different shapes of {name}: {mine} and {wanted}")


# ---- files of the same layout ----------------------------------------------------------------------------------------

_STRETCH = 4 << 20  # bytes: the running mean of a stretch stays in a processor's cache while all files are read


def _alike(files: Sequence[MappedFile | None]) -> TypeGuard[list[MappedFile]]:
    """Whether all have the same tensors, tied in the same way; if not, :class:`RunningMean` knows what to say."""
    described = {None if file is None else frozenset(_described(file)) for file in files}
    return len(described) == 1 and None not in described


def _described(file: MappedFile) -> Iterator[tuple[str, torch.dtype, torch.Size, str]]:
    first = {place: name for name, place in reversed(file.places.items())}
    for name, place in file.places.items():
        yield name, place.dtype, place.shape, first[place]


@torch.no_grad()
def _mean_of_mapped(files: list[MappedFile], weights: list[float], progress: bool) -> StateDict:
    shares = [w / total if total else 0.0 for w, total in zip(weights, itertools.accumulate(weights), strict=True)]
    last = files[-1]
    first = {place: name for name, place in reversed(last.places.items()) if place.has_mean}
    means: StateDict = {}
    stretches = list(runs(files, list(first.values()), _STRETCH))
    for names in shown(stretches, len(stretches), progress):
        means |= _means_in_stretch(files, names, shares)
    return {
        name: means[first[place]] if place in first else last.tensor(name).clone()
        for name, place in last.places.items()
    }


def _means_in_stretch(files: list[MappedFile], names: list[str], shares: list[float]) -> StateDict:
    places = [files[0].places[name] for name in names]
    begin, dtype = places[0].offset, places[0].dtype

    def mean(start: int, stop: int) -> Tensor:
        offsets = (file.places[names[0]].offset + start for file in files)
        values = (
            file.elements(offset, dtype, (stop - start) // dtype.itemsize)
            for file, offset in zip(files, offsets, strict=True)
        )
        moved = _wide(next(values))
        for value, share in zip(values, shares[1:], strict=True):
            _move_(moved, value, share)
        return moved

    if len(names) == 1:
        pieces = [mean(at, min(at + _STRETCH, places[0].size)).to(dtype) for at in range(0, places[0].size, _STRETCH)]
        return {names[0]: torch.cat(pieces).view(places[0].shape)}
    # What lies between the tensors is averaged too, and not taken.
    stretch = mean(0, max(place.offset + place.size for place in places) - begin)
    return {
        name: stretch[(place.offset - begin) // dtype.itemsize :][: place.shape.numel()]
        .view(place.shape)
        .to(dtype, copy=True)
        for name, place in zip(names, places, strict=True)
    }


def shown(items: Iterable[Any], count: int, progress: bool) -> Iterable[Any]:
    """The items, with a bar if one is wanted."""
    if not progress:
        return items
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # Lightning brings it

    return tqdm(items, total=count, desc="averaging", leave=False)
