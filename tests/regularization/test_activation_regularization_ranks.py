"""ActivationRegularization beside activation checkpointing on two processes, whole and sharded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from tests.harness.cells import Cell
from tests.harness.process_group import Group
from tests.harness.reference_loop import Loop, Outcome
from tests.integration.entry_fits import fit
from tests.lightning import LightningModule
from tests.registry import BY_NAME
from tests.test_matrix import assert_equal

CELL = Cell("automatic", "32-true", "ddp", "4short")


class Checkpointed(LightningModule):
    """Trait: compute the network again in the backward pass."""

    reentrant = False

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        x, y = batch
        return mse_loss(checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant), y)


class Reentrant(Checkpointed):
    reentrant = True


def job(strategy: Any, reentrant: bool) -> Outcome:
    return fit(
        BY_NAME["activations"], replace(CELL, strategy=strategy), Reentrant if reentrant else Checkpointed
    ).outcome


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_outputs_that_are_computed_twice_are_penalized_once(strategy: str, reentrant: bool, group: Group) -> None:
    expected = Loop(CELL.whole, BY_NAME["activations"].formula(CELL.whole)).run()
    for outcome in group.run(job, strategy, reentrant):
        assert_equal(outcome, expected, CELL)
