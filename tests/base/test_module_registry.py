"""Each test fails when torch has renamed a private name of `nn.Module`, or uses it for something else."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
import torch
from torch import nn

from lightning_optim.base import layer_classes, module_registry, recurrent_weights
from lightning_optim.base.shards import version


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("saved", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.register_buffer("empty", None)
        self.register_parameter("absent", None)


def says(name: str, functions: str) -> str:
    return (
        f"torch {torch.__version__} has renamed `{name}`, or uses it for something else: {functions} in"
        " lightning_optim/base/ read it"
    )


def test_buffers() -> None:
    layer = Layer()
    said = says("nn.Module._buffers", "buffer_names, buffer_of and set_buffer")
    assert list(module_registry.buffer_names(layer)) == ["saved", "hidden", "empty"], said
    assert module_registry.buffer_of(layer, "saved") is layer.saved, said
    assert module_registry.buffer_of(layer, "empty") is None and module_registry.buffer_of(layer, "no") is None, said
    new = torch.ones(5)
    module_registry.set_buffer(layer, "hidden", new)
    assert layer.hidden is new and dict(layer.named_buffers())["hidden"] is new, said


def test_persistent_buffers() -> None:
    layer = Layer()
    found = [name for name in ("saved", "hidden") if module_registry.is_persistent(layer, name)]
    assert found == ["saved"] == [name for name in layer.state_dict() if name in ("saved", "hidden")], says(
        "nn.Module._non_persistent_buffers_set", "is_persistent"
    )


def test_parameters() -> None:
    layer, said = Layer(), says("nn.Module._parameters", "parameter_of and registered_names")
    assert module_registry.parameter_of(layer, "scale") is layer.scale, said
    assert module_registry.parameter_of(layer, "absent") is None, said
    assert set(module_registry.registered_names(layer)) == {"inside", "scale", "absent", "saved", "hidden", "empty"}


def test_submodules() -> None:
    layer, said = Layer(), says("nn.Module._modules", "submodule_of and with_submodules")
    assert module_registry.submodule_of(layer, "inside") is layer.inside, said
    with pytest.raises(KeyError):
        module_registry.submodule_of(layer, "scale")
    new = nn.Linear(2, 2)
    copied = module_registry.with_submodules(layer, {"inside": new})
    assert copied.inside is new and layer.inside is not new and copied.scale is layer.scale, said
    assert type(copied) is Layer


@pytest.mark.parametrize("name", ["inside", "scale", "absent", "saved", "empty"])
def test_what_is_registered(name: str) -> None:
    said = says("nn.Module._modules, _parameters or _buffers", "is_registered")
    assert module_registry.is_registered(Layer(), name), said
    assert not module_registry.is_registered(Layer(), "training")
    assert all(kind in vars(Layer()) for kind in module_registry.REGISTRIES), said


def test_forward_pre_hooks() -> None:
    layer, hook = nn.Linear(2, 2), lambda module, inputs: None
    layer.register_forward_pre_hook(hook)
    assert module_registry.forward_pre_hooks(layer) == [hook], says("nn.Module._forward_pre_hooks", "forward_pre_hooks")


def test_base_classes_of_layers() -> None:
    said = says("nn.modules.batchnorm._BatchNorm, _NormBase or nn.modules.dropout._DropoutNd", "layer_classes.py")
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm1d):
        assert issubclass(kind, layer_classes.BatchNormBase), said
    for kind in (nn.BatchNorm1d, nn.InstanceNorm1d, nn.InstanceNorm3d, nn.SyncBatchNorm):
        assert issubclass(kind, layer_classes.RunningNormBase), said
    for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout):
        assert issubclass(kind, layer_classes.DropoutBase), said
    for other in (nn.LayerNorm, nn.GroupNorm, nn.Linear):
        assert not issubclass(other, layer_classes.RunningNormBase | layer_classes.DropoutBase), said
    assert not issubclass(nn.InstanceNorm1d, layer_classes.BatchNormBase), said


def test_weights_of_recurrent_layers() -> None:
    said = says("nn.RNNBase._flat_weights or _update_flat_weights", "with_weights")
    layer, x, zeros = nn.RNN(2, 3, bias=False), torch.ones(1, 1, 2), torch.zeros(3, 2)
    layer(x)
    layer.weight_ih_l0 = nn.Parameter(torch.ones(3, 2))
    assert not recurrent_weights.with_weights(layer, {"weight_ih_l0": zeros}, layer, (x,), {})[0].any(), said
    assert torch.equal(layer(x)[0], torch.full((1, 1, 3), 2.0).tanh()), said


def test_version_counter() -> None:
    tensor, said = torch.zeros(2), says("Tensor._version", "version")
    first = version(tensor)
    tensor.add_(1.0)
    assert version(tensor) == first + 1, said
    tensor.sum()
    assert version(tensor) == first + 1, said


def test_each_private_name_is_tested_here() -> None:
    """A name that is added to the files without a test here is found."""
    names = set()
    for module in (module_registry, layer_classes, recurrent_weights):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute | ast.alias):
                name = node.attr if isinstance(node, ast.Attribute) else node.name
                names |= {name} if re.match(r"_[A-Za-z]", name) else set()
    own = inspect.getsource(inspect.getmodule(test_version_counter))  # type: ignore[arg-type]
    assert len(names) >= 8
    assert not [name for name in names if name not in own]
