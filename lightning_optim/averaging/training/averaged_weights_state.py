"""Save and load the averages of a model: what a checkpoint holds in addition to the ``state_dict``."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.averaging.averages.average import Average
from lightning_optim.averaging.training.averaged_tensors import Sources, all_of, by_plain_name, copies_of, names_in
from lightning_optim.averaging.training.averaged_weights import AveragedWeights
from lightning_optim.base import module_tensors, shards
from lightning_optim.base.module_tensors import plain_name


def state_of(weights: AveragedWeights, evaluated: bool) -> dict[str, Any]:
    """Return the part of a checkpoint that the averages add to the model's ``state_dict``.

    Args:
        weights: The averages.
        evaluated: True if ``state_dict`` holds the average. The state then has the raw weights, and of the average
            only tensors that the model's dtype rounds; otherwise it has the average.
    """
    if weights.module is not None:
        weights.estimate_()
    raw, averaged = {}, {}
    for source, own, average in weights.located():
        if evaluated:
            raw[source.name] = own
        if not evaluated or average.dtype != own.dtype:
            averaged[source.name] = average
    declared = [average.declared_state() for average in weights.averages]
    return {
        "counters": [average.counters for average in weights.averages],
        **({"declared": declared} if any(declared) else {}),
        "raw": raw,
        "averaged": averaged,
        "own": weights.buffers.own(),
        "memory": _memory(weights),
        "fresh": weights.fresh,
        "estimated": weights.estimates.done,
        "names": [[source.name for source in sources if source.names] for sources in weights.sources],
        "buffers": [source.name for source in weights.buffers.sources if source.names],
    }


@torch.no_grad()
def load_state_(weights: AveragedWeights, state: dict[str, Any]) -> None:
    """Load the result of :func:`state_of`, after the model's ``state_dict``, and write the raw weights into the model.

    An average that is not in the state is that of ``state_dict``, which the model holds.
    """
    module = weights.alive()
    named = by_plain_name(module_tensors.named_tensors(module))
    raw, averaged = by_plain_name(state["raw"]), by_plain_name(state["averaged"])
    own = by_plain_name(state.get("own", {}))
    recorded = _add_recorded(weights, state, raw, averaged, named)
    weights.look_up()
    if "buffers" in state or any(state["counters"]):
        weights.buffers.leave_out(recorded)
    for index, counters in enumerate(state["counters"][: len(weights.averages)]):
        if not counters:
            continue
        # A weight without an average in the checkpoint begins with its raw value.
        saved = {name: value for name, value in raw.items() if name not in recorded} | averaged | own
        remembered = state.get("memory", {}).get(str(index), {})
        declared = state["declared"][index] if "declared" in state else {}
        for sources, average in _parts(weights, index):
            memory = [copies_of(sources, average, remembered[str(place)]) for place in range(len(remembered))]
            average.load_declared_state(declared)
            average.load(counters, copies_of(sources, average, saved), memory)
    weights.fresh = state.get("fresh", False)
    weights.buffers.load_estimates(own.keys(), averaged)
    weights.estimates.load(averaged, state.get("estimated", False))
    for name, tensor in named.items():
        if (value := raw.pop(name, None)) is not None and value.shape == tensor.shape:
            shards.copy_(tensor, value)
    if raw:  # neither parameters nor buffers, such as metrics, which an override of `state_dict` may hide
        for name, tensor in nn.Module.state_dict(module).items():
            if plain_name(name) in raw and isinstance(tensor, Tensor):
                shards.copy_(tensor, raw[plain_name(name)])


def _add_recorded(
    weights: AveragedWeights,
    state: dict[str, Any],
    raw: dict[str, Tensor],
    averaged: dict[str, Tensor],
    named: dict[str, Tensor],
) -> set[str]:
    """Average all parameters that a state has averages of, also frozen ones; return the names of its tensors."""
    names = names_in(weights.alive())
    held = {id(p): i for i, o in reversed(list(enumerate(weights.optimizers))) for p in all_of(o())}
    if "names" in state:
        for index, of_one in enumerate(state["names"][: len(weights.averages)]):
            found = [named.get(plain_name(name)) for name in of_one]
            weights.add(index, [p for p in found if isinstance(p, nn.Parameter)], names)
    else:
        for name in raw.keys() | averaged.keys():
            parameter = named.get(name)
            if isinstance(parameter, nn.Parameter) and weights.averages:
                # Lightning averages all weights. One that equals its average was not trained.
                if "updates_of_lightning" in state and _equal(averaged.get(name, parameter), raw.get(name, parameter)):
                    continue
                weights.add(held.get(id(parameter), 0), [parameter], names)
        return raw.keys() | averaged.keys()
    return {plain_name(name) for name in itertools.chain(*state["names"], state["buffers"])}


def _parts(weights: AveragedWeights, index: int) -> list[tuple[Sources, Average]]:
    """Return the tensors that are averaged with an optimizer, and their average; with the first one buffers too."""
    of_buffers = [(weights.buffers.sources, weights.buffers.average)] if index == 0 else []
    return [(weights.sources[index], weights.averages[index]), *of_buffers]


def _memory(weights: AveragedWeights) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return the past weights that policies keep (LAWA), by optimizer, age and name."""
    memory = {}
    for index, average in enumerate(weights.averages):
        remembered: dict[str, dict[str, Tensor]] = {str(place): {} for place in range(len(average.memory))}
        for sources, of_these in _parts(weights, index):
            for place, row in enumerate(of_these.memory):
                named = {s.name: past for s, past in zip(sources, row, strict=True) if s.names}
                remembered[str(place)].update(named)
        if remembered:
            memory[str(index)] = remembered
    return memory


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.cpu(), other.detach().cpu())
