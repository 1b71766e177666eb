"""Estimate the singular vectors of spectral normalization anew for averaged weights, which needs no data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_optim.averaging.training.averaged_tensors import Source
from lightning_optim.base.dtypes import accumulation_dtype
from lightning_optim.base.module_registry import buffer_of, forward_pre_hooks, parameter_of
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.runtime.lightning.spectral_norm import VECTORS, as_matrix, parametrization

_ITERATIONS = 50  # the estimate of the largest singular value is right to some percent even where the next one is close


@dataclass(eq=False)
class Spectral:
    r"""Estimate the vectors of a normalized weight :math:`W / (u^\top W v)`, which its layer keeps as buffers.

    The mean of unit vectors is not a unit vector, and not a singular vector of the mean of the weights.

    Attributes:
        owner: The module that has the vectors.
        keys: The names of the buffers ``u`` and ``v`` in it.
        parameters: Function that returns the parameters from which the weight is computed.
        matrix: Function that returns the weight as a matrix, before it is normalized.
        eps: Smallest norm by which a vector is divided.
    """

    owner: nn.Module
    keys: tuple[str, str]
    parameters: Callable[[], Iterable[nn.Parameter]]
    matrix: Callable[[], Tensor]
    eps: float

    @property
    def sharded(self) -> bool:
        """True if no rank holds the whole weight."""
        return any(isinstance(parameter, DTensor) for parameter in self.parameters())

    @torch.no_grad()
    def estimate_(self) -> None:
        """Set both vectors to those of the present weight by power iteration, starting from the present vectors."""
        u, v = (buffer_of(self.owner, key) for key in self.keys)
        assert u is not None and v is not None
        matrix = self.matrix()
        matrix = matrix.to(accumulation_dtype(matrix.dtype))
        right = v.to(matrix)
        for _ in range(_ITERATIONS):
            left = normalize(torch.mv(matrix, right), dim=0, eps=self.eps)
            right = normalize(torch.mv(matrix.mH, left), dim=0, eps=self.eps)
        u.copy_(left)
        v.copy_(right)


class SpectralEstimates:
    """Hold estimated vectors of all spectral normalizations of a model, for its averaged weights.

    The power iteration starts from the vectors that the model had at the last update, so that the result depends
    neither on when nor on how often it is computed.

    Attributes:
        done: True if the vectors belong to the present averaged weights.
    """

    def __init__(self, norms: Iterable[Spectral]) -> None:
        self._norms = [(norm, [Source(owner=norm.owner, key=key) for key in norm.keys]) for norm in norms]
        self._held = {source.place: source.tensor.detach().clone() for source in self.sources()}
        self.done = not self._norms

    def sources(self) -> Iterator[Source]:
        """Yield the model's vectors."""
        for _, pair in self._norms:
            yield from pair

    def pairs(self, averaged: set[int]) -> Iterator[tuple[Source, Tensor]]:
        """Yield each vector and its estimate, for weights with a parameter whose ``id`` is in ``averaged``."""
        for norm, pair in self._norms:
            if all(source.names for source in pair) and any(
                id(parameter) in averaged for parameter in norm.parameters()
            ):
                yield from ((source, self._held[source.place]) for source in pair)

    @torch.no_grad()
    def restart_(self) -> None:
        """Let the next estimate start from the model's present vectors."""
        for source in self.sources():
            if source.live is not None:
                self._held[source.place].copy_(source.live)
        self.done = not self._norms

    def estimate_(self, moved: set[tuple[int, str]]) -> None:
        """Estimate the vectors at the places ``moved``, in the model, which holds the average, and keep a copy."""
        for norm, pair in self._norms:
            if all(source.place in moved for source in pair):
                norm.estimate_()
                for source in pair:
                    self._held[source.place].copy_(source.tensor)
        self.done = True

    def load(self, saved: dict[str, Tensor], done: bool) -> None:
        """Load estimates by name; those that are not in ``saved`` are the model's vectors."""
        self.restart_()
        for source in self.sources():
            for name in source.names:
                if (value := saved.get(plain_name(name))) is not None:
                    self._held[source.place].copy_(value)
        self.done = done or not self._norms


def find(module: nn.Module) -> list[Spectral]:
    """Return all weights with spectral normalization, as a parametrization or as a hook."""
    found = []
    for owner in module.modules():
        if isinstance(owner, ParametrizationList):
            for position, part in enumerate(owner):
                if (norm := parametrization(part)) is not None:
                    found.append(_parametrized(owner, position, norm))
        for hook in forward_pre_hooks(owner):
            if isinstance(hook, SpectralNorm):
                found.append(_hooked(owner, hook))
    return found


def _parametrized(parts: ParametrizationList, position: int, norm: Any) -> Spectral:
    def matrix() -> Tensor:
        modes = [(module, module.training) for module in parts.modules()]
        parts.eval()  # those before this one may be normalized too
        try:
            names = ["original"] if parts.is_tensor else [f"original{i}" for i in range(parts.ntensors)]
            weight, *others = (getattr(parts, name) for name in names)
            for part in list(parts)[:position]:
                weight, others = part(weight, *others), []
        finally:
            for module, mode in modes:
                module.training = mode
        return as_matrix(norm, weight)

    return Spectral(norm, VECTORS, lambda: parts.parameters(recurse=False), matrix, norm.eps)


def _hooked(owner: nn.Module, hook: SpectralNorm) -> Spectral:
    def matrix() -> Tensor:
        return hook.reshape_weight_to_matrix(getattr(owner, f"{hook.name}_orig"))

    def parameters() -> list[nn.Parameter]:
        return [p for p in (parameter_of(owner, f"{hook.name}_orig"),) if p is not None]

    return Spectral(owner, (f"{hook.name}_u", f"{hook.name}_v"), parameters, matrix, hook.eps)
