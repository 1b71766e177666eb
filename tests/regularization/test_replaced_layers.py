"""A layer that is replaced in the middle of a run, in module and optimizer, is selected like the old one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import L1, L2, ClipByNorm, GradientClipping, ProximalL1, WeightRegularization
from lightning_optim.base.selection import Selection
from tests.lightning import Callback, LightningModule, Trainer


class Replaces(LightningModule):
    """Replace the head in the second epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 1)
        self.other = nn.Linear(3, 1)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.head = self.other
            self.other = nn.Identity()
            (group,) = self.trainer.optimizers[0].param_groups
            group["params"] = [*self.body.parameters(), *self.head.parameters()]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return mse_loss(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.body.parameters(), *self.head.parameters()], lr=0.1)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(16, 4, generator=generator)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


class Added(Replaces):
    """Add a second head that the module does not have at the start of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.made = [self.other]
        self.other = nn.Identity()

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.other = self.made.pop()
        super().on_train_epoch_start()


def trained(module: LightningModule, *callbacks: Callback) -> dict[str, Tensor]:
    trainer = Trainer(max_epochs=3, callbacks=list(callbacks), barebones=True)
    trainer.fit(module)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("on", ["head.weight", nn.Linear, ["head.*", "body.weight"], lambda name, p: "head" in name])
@pytest.mark.parametrize("term", [L1, L2, ProximalL1])
def test_terms(term: Any, on: Any) -> None:
    got = trained(Added(), WeightRegularization(term(0.05, on=on)))
    # The second head is in the module from the start here, under another name.
    also = [on, "other.*"] if not isinstance(on, list) else [*on, "other.*"]
    right = trained(Replaces(), WeightRegularization(term(0.05, on="*" if on is nn.Linear else also)))
    plain = trained(Added())
    if isinstance(on, str):  # a glob of weights only
        right = trained(Replaces(), WeightRegularization(term(0.05, on=[on, "other.weight"])))
    for name in got:
        torch.testing.assert_close(got[name], right[name], rtol=0, atol=0)
    assert (got["head.weight"] - plain["head.weight"]).abs().max() > 1e-3


def test_clipping() -> None:
    got = trained(Added(), GradientClipping(ClipByNorm(0.01, on="head.*")))
    right = trained(Replaces(), GradientClipping(ClipByNorm(0.01, on=["head.*", "other.*"])))
    plain = trained(Added())
    for name in got:
        torch.testing.assert_close(got[name], right[name], rtol=0, atol=0)
    assert (got["head.weight"] - plain["head.weight"]).abs().max() > 1e-3


def test_a_layer_that_goes_is_no_error() -> None:
    class Goes(Replaces):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.head = nn.Identity()
                self.last = self.other
                self.other = nn.Identity()
                (group,) = self.trainer.optimizers[0].param_groups
                group["params"] = [*self.body.parameters(), *self.last.parameters()]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            hidden = self.body(batch[0])
            return mse_loss(self.last(hidden) if self.current_epoch else self.head(hidden), batch[1])

    got = trained(Goes(), WeightRegularization(L2(0.05, on="head.weight")))
    assert got["last.weight"].isfinite().all()


def test_a_replaced_embedding_is_penalized_where_it_is_looked_up() -> None:
    """A batch that does not use it leaves it without a gradient, as with the first embedding."""

    class Words(Replaces):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 4, sparse=True)
            self.found: list[Any] = []

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.words = nn.Embedding(7, 4, sparse=True)
                self.trainer.optimizers[0].param_groups[0]["params"] = list(self.parameters())

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            words = self.words(torch.tensor([1])) if batch_idx % 2 else 0.0
            return mse_loss(self.head(self.body(batch[0] + words)), batch[1])

        def on_before_zero_grad(self, optimizer: Any) -> None:
            grad = self.words.weight.grad
            self.found.append(None if grad is None else grad.layout)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Words()
    trained(module, WeightRegularization(L2(0.05, on="*")))
    assert set(module.found) == {None, torch.sparse_coo}


def test_tensors_that_are_not_the_modules_cost_no_choice_in_each_step() -> None:
    """Each of several optimizers may have tensors that are not in the module, such as temperatures."""
    module = nn.Linear(2, 1)
    asked: list[str] = []

    def predicate(name: str, parameter: nn.Parameter) -> bool:
        asked.append(name)
        return name == "weight"

    selection = Selection(module, predicate)
    one, other = [*module.parameters(), nn.Parameter(torch.ones(1))], [nn.Parameter(torch.ones(1))]
    assert [selection.follow(held) for held in (one, other, one, other, one)] == [True, True, False, False, False]
    assert asked == ["weight", "bias"] * 3
    assert selection.ids == {id(module.weight)}
