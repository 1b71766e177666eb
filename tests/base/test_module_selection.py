"""Modules are chosen by name, class and predicate; those that a model never calls are not among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_optim.base.module_selection import select_modules


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), spectral_norm(nn.Linear(2, 2)))
        self.attention = nn.MultiheadAttention(2, 1)
        self.head = self.again = nn.Linear(2, 1)


@pytest.mark.parametrize(
    ("on", "names"),
    [
        ("*", ["encoder.0.0", "encoder.0.1", "encoder.1", "attention", "head"]),
        ("encoder.*", ["encoder.0.0", "encoder.0.1", "encoder.1"]),
        ("encoder.?", ["encoder.0", "encoder.1"]),
        ("encoder", ["encoder"]),
        ("again", ["again"]),
        (nn.Sequential, ["encoder", "encoder.0"]),
        (nn.Linear, ["encoder.0.0", "encoder.1", "head"]),
        (["head", nn.ReLU], ["encoder.0.1", "head"]),
        (lambda name, module: isinstance(module, nn.ReLU), ["encoder.0.1"]),
    ],
)
def test_modules_that_are_chosen(on: Any, names: list[str]) -> None:
    model = Model()
    found = select_modules(model, on)
    assert list(found) == names
    assert all(model.get_submodule(name) is module for name, module in found.items())


def test_a_compiled_module_is_the_outer_one() -> None:
    model = Model()
    model.encoder[0][0] = torch.compile(model.encoder[0][0])  # type: ignore[index,operator]
    assert select_modules(model, "encoder.0.0") == {"encoder.0.0": model.encoder[0][0]}  # type: ignore[index]
    assert select_modules(model, "encoder.0.*") == {
        "encoder.0.0": model.encoder[0][0],  # type: ignore[index]
        "encoder.0.1": model.encoder[0][1],  # type: ignore[index]
    }
    assert list(select_modules(model, nn.Linear)) == ["encoder.0.0", "encoder.1", "head"]


@pytest.mark.parametrize(
    ("on", "told"),
    [
        ("encodr.*", "`on='encodr.*'` matches no module of Model; did you mean 'encoder.*'?"),
        (["head", "hed"], "`on='hed'` matches no module of Model; did you mean 'head'?"),
        (nn.Conv2d, "`on=Conv2d` matches no module of Model. Its kinds of modules"),
        ("attention.out_proj", "matches no module"),
    ],
)
def test_what_matches_nothing_is_named(on: Any, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        select_modules(Model(), on)
    assert told in str(caught.value)
