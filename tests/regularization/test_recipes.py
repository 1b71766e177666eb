"""The recipes in the card of RegularizationMixin compute their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmax

from tests.harness import pages
from tests.lightning import LightningModule

PAGE = pages.ROOT / "docs" / "techniques" / "loss-terms.md"
BATCH = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 1, 0])


@pytest.fixture(scope="module")
def recipes() -> dict[str, Any]:
    """Return the names that the page defines, without the fits in it."""
    names = pages.given()
    for block in pages.blocks(PAGE, "python"):
        exec("\n".join(line for line in block.code.splitlines() if ".fit(" not in line), names)
    return names


def loss_of(module: LightningModule) -> Tensor:
    torch.manual_seed(1)
    loss: Any = module.training_step((BATCH[0].clone(), BATCH[1]), 0)
    return loss


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the mean over samples of the divergence of q from p."""
    return (p * (p.log() - q.log())).sum(1).mean()


def test_r_drop(recipes: dict[str, Any]) -> None:
    module = recipes["RDrop"](alpha=3.0)
    loss = loss_of(module)
    torch.manual_seed(1)
    x, y = BATCH
    one, other = module.net(torch.cat([x, x])).chunk(2)
    p, q = softmax(one, 1), softmax(other, 1)
    assert not torch.equal(p, q)
    of_paper = cross_entropy(one, y) + cross_entropy(other, y) + 3.0 / 2.0 * (divergence(p, q) + divergence(q, p))
    assert torch.allclose(loss, of_paper / 2.0, atol=1e-6)


def test_label_smoothing(recipes: dict[str, Any]) -> None:
    module = recipes["Smoothed"](smoothing=0.2)
    expected = cross_entropy(module.net(BATCH[0]), BATCH[1], label_smoothing=0.2)
    assert torch.allclose(loss_of(module), expected, atol=1e-6)


def test_distillation(recipes: dict[str, Any]) -> None:
    teacher = nn.Linear(4, 3)
    module = recipes["Student"](teacher, strength=0.7, temperature=3.0)
    x, y = BATCH
    p, q = softmax(teacher(x) / 3.0, 1), softmax(module.net(x) / 3.0, 1)
    expected = cross_entropy(module.net(x), y) + 0.7 * 9.0 * divergence(p, q)
    assert torch.allclose(loss_of(module), expected, atol=1e-6)
    assert not any("teacher" in name for name in module.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_gradient_penalty(recipes: dict[str, Any]) -> None:
    module = recipes["SmoothInInputs"](strength=0.5)
    x, y = BATCH

    def of_sample(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(module.net(x.unsqueeze(0)), y.unsqueeze(0))

    slopes = torch.stack([torch.func.grad(of_sample)(*sample) for sample in zip(x, y, strict=True)])
    expected = cross_entropy(module.net(x), y) + 0.5 * slopes.square().sum(1).mean()
    loss = loss_of(module)
    assert torch.allclose(loss, expected, atol=1e-6)
    (of_loss,) = torch.autograd.grad(loss, module.net[0].weight)

    def whole(weight: Tensor) -> Tensor:
        def of_one(x: Tensor, y: Tensor) -> Tensor:
            weights = {"0.weight": weight}
            return cross_entropy(torch.func.functional_call(module.net, weights, (x[None],)), y[None])

        total = torch.stack([of_one(*sample) for sample in zip(x, y, strict=True)]).mean()
        slopes = torch.stack([torch.func.grad(of_one)(*sample) for sample in zip(x, y, strict=True)])
        return total + 0.5 * slopes.square().sum(1).mean()

    assert torch.allclose(of_loss, torch.func.grad(whole)(module.net[0].weight.detach()), atol=1e-5)
