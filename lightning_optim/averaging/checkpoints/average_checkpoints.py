"""Means of the weights of several models or files."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_optim.averaging.average import kept_dtype
from lightning_optim.averaging.checkpoints import reading
from lightning_optim.base import shards
from lightning_optim.base.foreach import has_mean
from lightning_optim.runtime.files import safe_reading

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
        ValueError: If there is nothing to average, names or shapes differ, a tensor is sparse, or the weights do not
            fit.

    Example::

        >>> one, other = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = [p.data.fill_(v) for model, v in ((one, 1.0), (other, 4.0)) for p in model.parameters()]
        >>> average_weights([one, other], weights=[2, 1])["weight"]
        tensor([[2.]])
    """
    items = list(models_or_state_dicts) if isinstance(models_or_state_dicts, Iterable) else [models_or_state_dicts]
    if wrong := [item for item in items if not isinstance(item, nn.Module | Mapping)]:
        raise ValueError(
            f"`models_or_state_dicts` must be a list of modules or state dicts, got a {type(wrong[0]).__name__} in it"
        )
    states = [item.state_dict() if isinstance(item, nn.Module) else item for item in items]
    mean = RunningMean()
    for index, (state, weight) in enumerate(zip(states, _checked(weights, len(states)), strict=True)):
        mean.add(state, weight, f"model {index}")
    return mean.result()


def average_checkpoints(
    paths: Sequence[Path],
    weights: Sequence[float] | None = None,
    *,
    key: str | None = None,
    weights_only: bool = True,
    progress: bool = False,
) -> StateDict:
    r"""The weighted mean of the weights in several files, as :func:`average_weights` of what they hold.

    The files are read one after the other: memory is the mean in fp32 and one file, whatever their number. They may be
    Lightning's checkpoints, other dictionaries, plain state dicts, ``.safetensors`` files (with ``pip install
    safetensors``) or folders of a distributed checkpoint. The weights are what lies under ``state_dict`` (with
    :class:`WeightAveraging` the averaged weights), else under ``model``, ``model_state_dict`` or ``ema``, else the
    whole file; of names on several levels all are averaged. What is returned are the averaged weights alone.

    Before a file is averaged its sizes and checksums are checked: other values than were written never come out of a
    damaged archive of ``torch.save``. safetensors and torch's format before 1.6 hold no checksums; there only what no
    longer fits together is noticed.

    Args:
        paths: The files.
        weights: One number >= 0 for each, not all zero. Default: equal.
        key: Under which name the weights lie, where it is another, or there are several.
        weights_only: Read nothing but tensors and plain values: a file from a stranger can run any code otherwise.
        progress: Show a bar.

    Raises:
        OSError: If a file cannot be opened.
        ValueError: As :func:`average_weights`, or if a file is damaged, no checkpoint, or holds more than tensors and
            plain values. The message names the file.

    Example::

        >>> import os, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> paths = [os.path.join(folder, f"{value}.pt") for value in (1.0, 4.0)]
        >>> for path, value in zip(paths, (1.0, 4.0)):
        ...     torch.save({"weight": torch.tensor([value])}, path)
        >>> average_checkpoints(paths)
        {'weight': tensor([2.5000])}
    """
    names = listed(paths)
    given = _checked(weights, len(names))
    mean = RunningMean()
    with contextlib.closing(_checked_ahead(names, weights_only)) as files:
        for (path, is_checked), weight in shown(zip(files, given, strict=True), len(names), progress):
            mean.add(reading.weights_in(path, weights_only, key, check=not is_checked), weight, path)
    return mean.finish()


def listed(paths: Sequence[Path]) -> list[str]:
    """Return the names of files, where one alone is no list.

    Raises:
        ValueError: If these are no paths.
    """
    is_one = isinstance(paths, str | bytes | os.PathLike)
    if is_one or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise ValueError(f"`paths` must be a list of paths, got {paths!r}")
    return [os.fspath(path) for path in paths]


def _checked_ahead(names: Sequence[str], weights_only: bool) -> Generator[tuple[str, bool], None, None]:
    """Yield each file, and whether it is checked: the checksums of the next are computed while one is averaged."""
    with ThreadPoolExecutor(max_workers=1) as beside:
        check = beside.submit(_check, names[0], weights_only)
        for index, name in enumerate(names):
            is_checked = check.result()
            if index + 1 < len(names):
                check = beside.submit(_check, names[index + 1], weights_only)
            yield name, is_checked


def _check(name: str, weights_only: bool) -> bool:
    """Check a file of the local disk; from elsewhere a file comes once, and is checked when it is read."""
    if not os.path.isfile(name):
        return False
    safe_reading.check(name, weights_only)
    return True


def _checked(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise ValueError("there is nothing to average")
    try:
        given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError):
        given = []
    if len(given) != count or not all(math.isfinite(w) and w >= 0.0 for w in given) or not 0.0 < sum(given) < math.inf:
        raise ValueError(f"`weights` must be {count} numbers >= 0, not all zero, with a finite sum, got {weights!r}")
    return given


class _Averaged(NamedTuple):
    """Dtype and shape of a tensor whose values are in the mean."""

    dtype: torch.dtype
    shape: torch.Size


class RunningMean:
    """The weighted mean of state dicts that come one after the other, in fp32 or better.

    Of names on several levels all are averaged. Nothing of what was added is held, so that a file can be let go.

    Attributes:
        total: The sum of the weights so far.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._means: dict[reading.Path, Tensor] = {}
        self._ties: dict[reading.Path, reading.Path] = {}
        self._last: dict[reading.Path, Any] = {}
        self._label = ""

    @torch.no_grad()
    def add(self, state: Mapping[Any, Any], weight: float = 1.0, label: str = "") -> None:
        """Take in one more; its name stands in the error if it does not fit."""
        leaves = dict(reading.leaves(state))
        for path, value in leaves.items():
            if isinstance(value, Tensor) and (value.is_meta or has_mean(value)):
                _check_values(path, value, label)
        if not self._last:
            if not any(map(has_mean, leaves.values())):
                raise ValueError(f"{label} holds no floating-point tensors by name: there is nothing to average")
            self._ties, self._label = ties(leaves), label
            self._means = {p: _wide(value) for p, value in leaves.items() if has_mean(value) and p not in self._ties}
            self.total = weight
        else:
            _check_like(leaves, self._last, label, self._label)
            self._untie(ties(leaves))
            self.total += weight
            share = weight / self.total if self.total else 0.0
            for path, mean in self._means.items():
                _move_(mean, leaves[path], share)
        self._last = {
            path: _Averaged(value.dtype, value.shape) if has_mean(value) else _copied(value)
            for path, value in leaves.items()
        }

    def _untie(self, now: dict[reading.Path, reading.Path]) -> None:
        """What is tied in one and not in another has a mean of its own."""
        for path in [path for path, first in self._ties.items() if now.get(path) != first]:
            self._means[path] = self._means[self._ties.pop(path)].clone()

    def result(self) -> StateDict:
        """The mean in the dtypes of the last, whose integers and other values it has."""
        return self._built(self._means.__getitem__)

    def finish(self) -> StateDict:
        """Return the same, where no more is added: each wide mean is freed as the result is made of it."""
        return self._built(self._means.pop)

    @torch.no_grad()
    def _built(self, take: Callable[[reading.Path], Tensor]) -> StateDict:
        means = {path: take(path).to(self._last[path].dtype) for path in list(self._means)}
        built: StateDict = {}
        for path, value in self._last.items():
            level = built
            for name in path[:-1]:
                level = level.setdefault(name, {})
            level[path[-1]] = means[self._ties.get(path, path)] if isinstance(value, _Averaged) else _copied(value)
        return built

    def __copy__(self) -> RunningMean:
        """One that goes on by itself."""
        other = RunningMean()
        other.__dict__.update(self.__dict__)
        other._means = {path: mean.clone() for path, mean in self._means.items()}
        other._ties = dict(self._ties)
        return other


_CHUNK = 1 << 20  # elements of the temporary where dtypes differ


def _move_(mean: Tensor, value: Tensor, share: float) -> None:
    if not share:
        return
    if share == 1.0:
        mean.copy_(value)  # all before had no weight
        return
    pieces = (torch.split(tensor, _CHUNK) for tensor in _flat_parts(mean, value))
    for some, piece in zip(*pieces, strict=True):
        other = piece.to(some.device, some.dtype)
        if some.sum().isfinite():
            some.lerp_(other, share)
        else:  # `lerp` subtracts, and of infinities that is no number
            weighted = some * (1.0 - share) + other * share
            some.copy_(torch.where(some.isfinite(), some.lerp(other, share), weighted))


def _flat_parts(mean: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as vectors, of sharded ones this process's part; that of the mean is live storage."""
    if isinstance(value, DTensor) and isinstance(mean, DTensor) and value.placements == mean.placements:
        ours, theirs = mean.to_local(), value.to_local()
    else:
        (ours,) = shards.local_shards([mean])
        full = value.full_tensor() if isinstance(value, DTensor) else value
        theirs = shards.shard_of(full.to(ours.device), mean)
    return ours.view(-1), theirs.reshape(-1)


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(kept_dtype(value.dtype), copy=True, memory_format=torch.contiguous_format)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def ties(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The later names of each tensor that has several, to the first."""
    first: dict[Any, Any] = {}
    found = {}
    for name, value in state.items():
        if not has_mean(value) or value.layout is not torch.strided or value.is_nested:
            continue
        (part,) = shards.local_shards([value])  # a DTensor itself has no address
        if part.numel():
            place = (part.data_ptr(), value.shape, value.stride(), value.dtype)
            if place in first:
                found[name] = first[place]
            else:
                first[place] = name
    return found


def _check_values(path: reading.Path, value: Tensor, label: str) -> None:
    """Refuse a tensor of which there is no mean element by element."""
    kind = "nested" if value.is_nested else "sparse" if value.layout is not torch.strided else value.device.type
    if kind in ("nested", "sparse", "meta"):
        raise ValueError(f"{label}: {_dotted(path)} is a {kind} tensor, of which there is no mean")


def _check_like(
    state: Mapping[reading.Path, Any], last: Mapping[reading.Path, Any], label: str, first_label: str
) -> None:
    if state.keys() != last.keys():
        only = sorted(map(_dotted, state.keys() ^ last.keys()))
        raise ValueError(f"{label} and {first_label} have different names: {only[:5]} are in one of them only")
    for path, value in state.items():
        mine, wanted = getattr(value, "shape", None), getattr(last[path], "shape", None)
        if mine != wanted:
            raise ValueError(f"{label} and {first_label} have different shapes of {_dotted(path)}: {mine} and {wanted}")
        if _kind(value) != _kind(last[path]):
            kinds = f"{_kind(value)} and {_kind(last[path])}"
            raise ValueError(f"{label} and {first_label} hold {_dotted(path)} as numbers of two kinds: {kinds}")


def _kind(value: Any) -> str:
    """Return the kind of a value: between values of two kinds there is no mean."""
    if not isinstance(value, _Averaged) and not has_mean(value):
        return "no floating-point numbers"
    return "complex" if value.dtype.is_complex else "real"


def _dotted(path: reading.Path) -> str:
    return ".".join(map(str, path))


def shown(items: Iterable[Any], count: int, progress: bool) -> Iterable[Any]:
    """The items, with a bar if one is wanted."""
    if not progress:
        return items
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # Lightning brings it

    return tqdm(items, total=count, desc="averaging", leave=False)
