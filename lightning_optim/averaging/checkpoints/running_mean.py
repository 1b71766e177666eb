"""Compute the weighted mean of state dicts that come one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.averaging.checkpoints.reading import Keys, leaves
from lightning_optim.base import shards
from lightning_optim.base.dtypes import accumulation_dtype, has_mean

StateDict: TypeAlias = dict[str, Any]


class _Averaged(NamedTuple):
    """Hold the dtype and shape of a tensor whose values are in the mean."""

    dtype: torch.dtype
    shape: torch.Size


class RunningMean:
    """Accumulate the weighted mean of state dicts in fp32 or wider, on all levels of nested dictionaries.

    It keeps no tensor of the state dicts that were added, so that their files can be closed.

    Attributes:
        total: Sum of the weights so far.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._means: dict[Keys, Tensor] = {}
        self._ties: dict[Keys, Keys] = {}  # the later names of a tied tensor to its first
        self._last: dict[Keys, Any] = {}  # the values of the last state dict, without tensors that are in the mean
        self._label = ""

    @torch.no_grad()
    def add(self, state: Mapping[Any, Any], weight: float = 1.0, label: str = "") -> None:
        """Add a state dict.

        Args:
            state: The state dict.
            weight: Its weight, >= 0.
            label: Its name in error messages.

        Raises:
            ValueError: If names, shapes or kinds of numbers differ from those before, or a tensor has no mean.
        """
        values = dict(leaves(state))
        for path, value in values.items():
            if isinstance(value, Tensor) and (value.is_meta or has_mean(value)):
                _check_values(path, value, label)
        if not self._last:
            if not any(map(has_mean, values.values())):
                raise ValueError(f"{label} holds no floating-point tensors by name: there is nothing to average")
            self._ties, self._label = ties(values), label
            self._means = {p: _wide(value) for p, value in values.items() if has_mean(value) and p not in self._ties}
            self.total = weight
        else:
            _check_like(values, self._last, label, self._label)
            self._untie(ties(values))
            self.total += weight
            share = weight / self.total if self.total else 0.0
            for path, mean in self._means.items():
                _move_(mean, values[path], share)
        self._last = {
            path: _Averaged(value.dtype, value.shape) if has_mean(value) else _copied(value)
            for path, value in values.items()
        }

    def _untie(self, now: dict[Keys, Keys]) -> None:
        """Give names that are no longer tied a mean of their own."""
        for path in [path for path, first in self._ties.items() if now.get(path) != first]:
            self._means[path] = self._means[self._ties.pop(path)].clone()

    def result(self) -> StateDict:
        """Return the mean, in the dtypes of the last state dict and with its integers and other values."""
        return self._built(self._means.__getitem__)

    def finish(self) -> StateDict:
        """Return :meth:`result`, and free each wide mean when it is converted. Nothing can be added afterwards."""
        return self._built(self._means.pop)

    @torch.no_grad()
    def _built(self, take: Callable[[Keys], Tensor]) -> StateDict:
        means = {path: take(path).to(self._last[path].dtype) for path in list(self._means)}
        built: StateDict = {}
        for path, value in self._last.items():
            level = built
            for name in path[:-1]:
                level = level.setdefault(name, {})
            level[path[-1]] = means[self._ties.get(path, path)] if isinstance(value, _Averaged) else _copied(value)
        return built

    def __copy__(self) -> RunningMean:
        """Return a copy to which state dicts can be added independently."""
        other = RunningMean()
        other.__dict__.update(self.__dict__)
        other._means = {path: mean.clone() for path, mean in self._means.items()}
        other._ties = dict(self._ties)
        return other


_CHUNK = 1 << 20  # elements of the temporary if dtypes differ


def _move_(mean: Tensor, value: Tensor, share: float) -> None:
    """Move a mean by a share of the way to a value, in chunks."""
    if not share:
        return
    if share == 1.0:
        mean.copy_(value)  # all state dicts before had weight 0
        return
    pieces = (torch.split(tensor, _CHUNK) for tensor in _flat_parts(mean, value))
    for some, piece in zip(*pieces, strict=True):
        other = piece.to(some.device, some.dtype)
        if some.sum().isfinite():
            some.lerp_(other, share)
        else:  # `lerp` subtracts, which makes NaN of infinities
            weighted = some * (1.0 - share) + other * share
            some.copy_(torch.where(some.isfinite(), some.lerp(other, share), weighted))


def _flat_parts(mean: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as vectors, or this rank's shards of them; that of the mean shares its storage."""
    if isinstance(value, DTensor) and isinstance(mean, DTensor) and value.placements == mean.placements:
        ours, theirs = mean.to_local(), value.to_local()
    else:
        (ours,) = shards.local_shards([mean])
        full = value.full_tensor() if isinstance(value, DTensor) else value
        theirs = shards.shard_of(full.to(ours.device), mean)
    return ours.view(-1), theirs.reshape(-1)


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(accumulation_dtype(value.dtype), copy=True, memory_format=torch.contiguous_format)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def ties(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the first name of each tied tensor by its later names."""
    first: dict[Any, Any] = {}
    found = {}
    for name, value in state.items():
        if not has_mean(value) or value.layout is not torch.strided or value.is_nested:
            continue
        (part,) = shards.local_shards([value])  # a DTensor has no address
        if part.numel():
            place = (part.data_ptr(), value.shape, value.stride(), value.dtype)
            if place in first:
                found[name] = first[place]
            else:
                first[place] = name
    return found


def _check_values(path: Keys, value: Tensor, label: str) -> None:
    """Refuse a tensor that cannot be averaged element by element."""
    kind = "nested" if value.is_nested else "sparse" if value.layout is not torch.strided else value.device.type
    if kind in ("nested", "sparse", "meta"):
        raise ValueError(f"{label}: {_dotted(path)} is a {kind} tensor, which has no mean")


def _check_like(state: Mapping[Keys, Any], last: Mapping[Keys, Any], label: str, first_label: str) -> None:
    if state.keys() != last.keys():
        only = sorted(map(_dotted, state.keys() ^ last.keys()))
        raise ValueError(
            f"{label} and {first_label} have different names: {only[:5]} are in one of them only. Average weights of"
            " one architecture."
        )
    for path, value in state.items():
        mine, wanted = getattr(value, "shape", None), getattr(last[path], "shape", None)
        if mine != wanted:
            raise ValueError(
                f"{label} and {first_label} have different shapes of {_dotted(path)}: {mine} and {wanted}. Average"
                " weights of one architecture."
            )
        if _kind(value) != _kind(last[path]):
            kinds = f"{_kind(value)} and {_kind(last[path])}"
            raise ValueError(f"{label} and {first_label} hold {_dotted(path)} as numbers of two kinds: {kinds}")


def _kind(value: Any) -> str:
    """Return the kind of a value, since values of two kinds have no mean."""
    if not isinstance(value, _Averaged) and not has_mean(value):
        return "no floating-point numbers"
    return "complex" if value.dtype.is_complex else "real"


def _dotted(path: Keys) -> str:
    return ".".join(map(str, path))
