"""Means of the weights of several models or files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_optim.averaging import reading
from lightning_optim.averaging.average import kept_dtype

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
    if all(reading.is_safetensors(path) for path in names):
        return _mean_of_safetensors(names, given, progress)
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


@torch.no_grad()
def _mean_of_safetensors(paths: list[str], weights: list[float], progress: bool) -> StateDict:
    """Tensor by tensor over all files, so that the running mean stays in the cache."""
    files = [reading.open_safetensors(path) for path in paths]
    names = [set(file.keys()) for file in files]
    for path, found in zip(paths, names, strict=True):
        if found != names[0]:
            raise ValueError(f"{path} and {paths[0]} have different names: {sorted(found ^ names[0])[:5]}")
    result: StateDict = {}
    ordered = list(files[0].keys())
    for name in shown(ordered, len(ordered), progress):
        value, *others = (file.get_tensor(name) for file in files)
        for path, other in zip(paths[1:], others, strict=True):
            if other.shape != value.shape:
                _check_like({name: other}, {name: value}, path, paths[0])
        last = others[-1] if others else value
        if not _has_mean(last):
            result[name] = last.clone()
            continue
        mean, total = _wide(value), weights[0]
        for other, weight in zip(others, weights[1:], strict=True):
            total += weight
            _move_(mean, other, weight / total if total else 0.0)
        result[name] = mean.to(last.dtype)
    return result


def shown(items: Iterable[Any], count: int, progress: bool) -> Iterable[Any]:
    """The items, with a bar if one is wanted."""
    if not progress:
        return items
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # Lightning brings it

    return tqdm(items, total=count, desc="averaging", leave=False)
