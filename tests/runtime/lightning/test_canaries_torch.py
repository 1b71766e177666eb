"""The private names of torch mean what `torch_internals.py` and `spectral_norm.py` take them for."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.parametrizations import spectral_norm as normalize

from lightning_optim.base.module_tensors import plain_name
from lightning_optim.runtime.lightning import spectral_norm, torch_internals
from tests.runtime.lightning.canaries import canary


@canary("_SpectralNorm", "_u", "_v")
def test_singular_vectors() -> None:
    layer = normalize(nn.Linear(3, 2))
    (part,) = layer.parametrizations.weight
    norm = spectral_norm.parametrization(part)
    assert norm is part
    u, v = (norm.get_buffer(name) for name in spectral_norm.VECTORS)
    assert u.shape == (2,) and v.shape == (3,)
    layer.eval()
    original = layer.parametrizations.weight.original
    torch.testing.assert_close(layer.weight, original / (u @ original @ v))
    vector = nn.Module()
    vector.weight = nn.Parameter(torch.ones(3))
    (of_vector,) = normalize(vector).parametrizations.weight
    assert spectral_norm.parametrization(of_vector) is None
    assert spectral_norm.parametrization(layer) is None
    del norm._buffers["_u"]
    with pytest.raises(RuntimeError, match=r"holds \['_v'\]: `_u` is gone.*torch"):
        spectral_norm.parametrization(part)


@canary("_reshape_weight_to_matrix")
def test_weights_as_matrices() -> None:
    layer = normalize(nn.Conv2d(3, 4, 2))
    (part,) = layer.parametrizations.weight
    weight = layer.parametrizations.weight.original
    assert torch.equal(spectral_norm.as_matrix(part, weight), weight.flatten(1))
    layer = normalize(nn.ConvTranspose2d(3, 4, 2))
    (part,) = layer.parametrizations.weight
    weight = layer.parametrizations.weight.original
    assert torch.equal(spectral_norm.as_matrix(part, weight), weight.transpose(0, 1).flatten(1))


@canary("_unsafe_preserve_version_counter")
def test_versions_are_kept() -> None:
    def backward(kept: bool) -> Tensor:
        weight = nn.Parameter(torch.tensor([2.0]))
        loss = (weight * weight).sum()
        with torch.no_grad(), torch_internals.keep_versions([weight] if kept else []):
            weight.add_(1.0)
            weight.sub_(1.0)
        loss.backward()
        assert weight.grad is not None
        return weight.grad

    assert backward(kept=True).item() == 4.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(kept=False)


class Checked(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        torch_internals.assert_in_graph((one == other).all(), "they differ")
        return one + other


@canary("_assert_async")
def test_assertions_in_a_graph() -> None:
    one, other = torch.ones(2), torch.zeros(2)
    program = torch.export.export(Checked(), (one, one.clone())).module()
    assert torch.equal(program(one, one), one + one)
    for call in (program, Checked()):
        with pytest.raises(RuntimeError, match="they differ"):
            call(one, other)


@canary("_compiled_call_impl")
def test_modules_that_compile_in_place() -> None:
    layer = nn.Linear(1, 1)
    assert not torch_internals.is_compiled(layer)
    layer.compile(backend="eager")
    assert torch_internals.is_compiled(layer) and torch_internals.uncompiled(layer) is layer


@canary("_C", "_functorch", "_python_dispatch")
def test_transforms_are_seen() -> None:
    seen = []

    def twice(value: Tensor) -> Tensor:
        seen.append(torch_internals.is_transformed())
        return 2 * value

    twice(torch.ones(2))
    torch.func.vmap(twice)(torch.ones(2))
    make_fx(twice)(torch.ones(2))
    assert seen == [False, True, True]


@canary("_dynamo", "_orig_mod")
def test_modules_that_are_wrapped_to_compile() -> None:
    layer = nn.Linear(1, 1)
    wrapped = torch.compile(layer, backend="eager")
    assert torch_internals.uncompiled(wrapped) is layer and torch_internals.uncompiled(layer) is layer
    assert torch_internals.is_compiled(wrapped)
    assert {plain_name(name) for name in wrapped.state_dict()} == {"weight", "bias"} != set(wrapped.state_dict())


@canary("_metadata")
def test_versions_in_a_state_dict() -> None:
    layer = nn.Sequential(nn.BatchNorm1d(2))
    state = layer.state_dict()
    assert torch_internals.state_metadata(state) == {"": {"version": 1}, "0": {"version": 2}}
    assert torch_internals.state_metadata({}) is None
    # A state dict of version 1 has no `num_batches_tracked`.
    del state["0.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        layer.load_state_dict(state)
    torch_internals.set_state_metadata(state, {"": {"version": 1}, "0": {"version": 1}})  # type: ignore[arg-type]
    layer.load_state_dict(state)
    assert isinstance(state, OrderedDict)


class Output(NamedTuple):
    logits: Tensor
    names: list[str]


@canary("_pytree")
def test_trees() -> None:
    tree = {"out": Output(torch.ones(2), ["a"]), "more": (torch.zeros(1), None)}
    doubled = torch_internals.tree_map_only(Tensor, lambda tensor: tensor * 2, tree)
    assert isinstance(doubled["out"], Output) and doubled["out"].logits.tolist() == [2.0, 2.0]
    assert doubled["out"].names == ["a"] and doubled["more"][1] is None
    leaves, structure = torch_internals.tree_flatten(tree)
    assert sum(isinstance(leaf, Tensor) for leaf in leaves) == 2 and "a" in leaves
    again = torch_internals.tree_unflatten(leaves, structure)
    assert isinstance(again["out"], Output) and again["out"].logits is tree["out"].logits
    assert len(torch_internals.tree_leaves(tree)) == len(leaves)
    structure = torch_internals.structure_of(tree)
    assert structure == torch_internals.structure_of(doubled) != torch_internals.structure_of({**tree, "out": 1})
