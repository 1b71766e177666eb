"""Decide for each buffer of a model which value an average has: its mean, its latest value, or an estimate."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from lightning_optim.averaging.batchnorm.statistics import statistics_layers
from lightning_optim.averaging.training import spectral_norm_vectors
from lightning_optim.averaging.training.averaged_buffers import can_be_averaged
from lightning_optim.averaging.training.averaged_tensors import Names, Source, names_in
from lightning_optim.base.layer_classes import BatchNormBase
from lightning_optim.base.module_registry import buffer_names, buffer_of, forward_pre_hooks
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.base.suggestions import nearest_pattern, shown
from lightning_optim.runtime.lightning import MisconfigurationException
from lightning_optim.runtime.lightning.pruning import pruned_name

BufferMode: TypeAlias = Literal["average", "copy", "refresh"]
BufferModes: TypeAlias = BufferMode | Mapping[str, BufferMode]

_STATISTICS = ("running_mean", "running_var")

_NOT_MEANS = (
    ("torch.ao.quantization.observer", "ObserverBase"),
    ("torch.ao.quantization.fake_quantize", "FakeQuantizeBase"),
    ("torch.ao.pruning.sparsifier.utils", "FakeSparsity"),
    ("torch.nn.utils.parametrizations", "_Orthogonal"),
    ("torchao.quantization.observer", "AffineQuantizedObserverBase"),
    ("torchao.quantization.pt2e.observer", "ObserverBase"),
    ("torchao.quantization.pt2e.fake_quantize", "FakeQuantizeBase"),
    ("torchao.quantization.qat.fake_quantizer", "FakeQuantizerBase"),
    ("torchmetrics", "Metric"),
)
"""Classes, by module and name, whose floating-point buffers have no mean: scales that belong to integer zero points,
extremes, histograms, masks, bases, and counts of a metric. They are looked up in ``sys.modules``, since a module that
was never imported has no instances."""


@dataclass
class BufferPlan:
    """Sort the buffers of a model by the way in which an average gets their values. The rest is copied.

    Attributes:
        averaged: Buffers that are averaged, in the order of the model.
        layers: BatchNorm layers whose statistics are estimated from data. They are in ``averaged`` too, for uses before
            an estimate.
        vectors: Spectral normalizations whose vectors are estimated by power iteration.
    """

    averaged: list[Source] = field(default_factory=list)
    layers: list[BatchNormBase] = field(default_factory=list)
    vectors: list[spectral_norm_vectors.Spectral] = field(default_factory=list)


def check_buffer_modes(buffers: Any) -> None:
    """Check the argument ``buffers``.

    Raises:
        ValueError: If it is neither a mode nor ``None`` nor a dictionary from patterns to modes.
    """
    modes = buffers if isinstance(buffers, Mapping) else {} if buffers is None else {"*": buffers}
    if any(not isinstance(name, str) or mode not in get_args(BufferMode) for name, mode in modes.items()):
        raise ValueError(
            f'`buffers` must be "average", "refresh", "copy" or None, got {buffers!r}; or a dictionary from patterns of'
            ' names to the first three, such as {"encoder.*": "copy", "*": "average"}'
        )


def plan_buffers(module: nn.Module, buffers: BufferModes, default: BufferMode, callback: str) -> BufferPlan:
    """Choose the mode of each saved floating-point buffer from its name and kind, never from its value.

    The first pattern that matches decides. Where no pattern matches, kinds without a mean are copied, vectors of
    spectral normalization are estimated, and all other buffers have the mode of the pattern ``"*"``, else the default.

    Args:
        module: The model.
        buffers: A mode for all buffers, or a dictionary from name patterns to modes.
        default: The mode of buffers that match no pattern.
        callback: Name of the callback, for messages.

    Raises:
        MisconfigurationException: If a pattern matches no buffer that can have its mode, or if two buffers that
            are estimated together have different modes.
    """
    patterns = dict(buffers) if isinstance(buffers, Mapping) else {"*": buffers}
    rest = patterns.pop("*", default)
    names = names_in(module)
    chosen = _by_pattern(module, names, patterns, callback)
    normed = [n for n in spectral_norm_vectors.find(module) if all(key in buffer_names(n.owner) for key in n.keys)]
    of_vectors = {(id(norm.owner), key) for norm in normed for key in norm.keys}
    copied = set(_no_means(module))
    estimable = of_vectors | {(id(layer), key) for layer in statistics_layers(module) for key in _STATISTICS}
    plan, done = BufferPlan(), set[int]()
    found: dict[tuple[int, str], BufferMode] = {}
    for owner, key, buffer in _saved(module, names):
        place = (id(owner), key)
        by_kind: BufferMode = "refresh" if place in of_vectors else "copy" if place in copied else rest
        found[place] = chosen.get(place, by_kind)
        if chosen.get(place) == "refresh" and place not in estimable and can_be_averaged(buffer):
            raise MisconfigurationException(
                f'{callback}(buffers={buffers!r}): "refresh" estimates statistics of BatchNorm and vectors of spectral'
                f' normalization anew, and {_name(names, buffer)!r} is neither: choose "average" or "copy" for it.'
            )
        estimated = place in of_vectors and found[place] == "refresh"
        if found[place] != "copy" and not estimated and can_be_averaged(buffer) and id(buffer) not in done:
            done.add(id(buffer))  # a shared buffer is averaged once
            plan.averaged.append(Source(owner=owner, key=key, names=names[id(buffer)]))
    _estimate_in_pairs(plan, module, normed, names, found, callback)
    return plan


def _estimate_in_pairs(
    plan: BufferPlan,
    module: nn.Module,
    normed: list[spectral_norm_vectors.Spectral],
    names: Names,
    found: dict[tuple[int, str], BufferMode],
    callback: str,
) -> None:
    """Add the layers to estimate to the plan. Both buffers of a layer are estimated together."""

    def whole(owner: nn.Module, keys: Iterable[str]) -> bool:
        modes = [found.get((id(owner), key)) for key in keys]
        if "refresh" in modes and len(set(modes)) > 1:
            pair = [_name(names, buffer_of(owner, key)) for key in keys]
            raise MisconfigurationException(
                f'{callback}(buffers=…): {pair} are estimated together, and got {modes}: pass "refresh" for both'
                " or for neither."
            )
        return modes[0] == "refresh"

    plan.layers = [layer for layer in statistics_layers(module) if whole(layer, _STATISTICS)]
    plan.vectors = [norm for norm in normed if whole(norm.owner, norm.keys)]


def _by_pattern(
    module: nn.Module, names: Names, patterns: Mapping[str, BufferMode], callback: str
) -> dict[tuple[int, str], BufferMode]:
    """Return the place and the mode of each buffer that a pattern matches."""
    chosen: dict[tuple[int, str], BufferMode] = {}
    for pattern, mode in patterns.items():
        hits = 0
        for owner, key, buffer in _saved(module, names):
            if any(fnmatch.fnmatchcase(plain_name(name), pattern) for name in names[id(buffer)]):
                chosen.setdefault((id(owner), key), mode)
                hits += mode == "copy" or can_be_averaged(buffer)
        if not hits:
            known = [plain_name(names[id(b)][0]) for _, _, b in _saved(module, names) if can_be_averaged(b)]
            raise MisconfigurationException(
                f"{callback}(buffers=…): the pattern {pattern!r} matches no saved floating-point buffer of"
                f" {type(module).__name__}{nearest_pattern(pattern, known) or '.'} Its floating-point buffers:"
                f" {shown(known)}. Integers and bools are always the latest."
            )
    return chosen


def _saved(module: nn.Module, names: Names) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield the owner, key and tensor of each buffer that a ``state_dict`` has."""
    for owner in module.modules():
        for key in buffer_names(owner):
            buffer = buffer_of(owner, key)
            if buffer is not None and id(buffer) in names:
                yield owner, key, buffer


def _no_means(module: nn.Module) -> Iterator[tuple[int, str]]:
    """Yield the places of buffers that are known to have no mean: of the classes above, and masks of pruning."""
    kinds = tuple(kind for name, of in _NOT_MEANS if isinstance(kind := getattr(sys.modules.get(name), of, None), type))
    for owner in module.modules():
        if isinstance(owner, kinds):
            yield from ((id(part), key) for part in owner.modules() for key in buffer_names(part))
        for hook in forward_pre_hooks(owner):
            if isinstance(hook, BasePruningMethod):
                yield id(owner), f"{pruned_name(hook)}_mask"


def _name(names: Names, buffer: Any) -> str:
    return plain_name(names[id(buffer)][0]) if id(buffer) in names else "?"
