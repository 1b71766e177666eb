"""Statistics from training steps that communicate, on two ranks: as many on both, and no trace in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_optim import SWA, WeightAveraging, refresh_batchnorm_
from tests.averaging.models import Model, assert_close, assert_equal, data, norm_net, two_processes
from tests.harness.process_group import Group, JobFailed


def _whole(module: nn.Module) -> dict[str, Tensor]:
    named = module.state_dict().items()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in named}


def _rows(rank: int) -> list[Any]:
    return [(x[rank::2], y[rank::2]) for x, y in data(size=6)]


class Slope(nn.Module):
    """A layer that needs gradients: without them an error ends the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        (slope,) = torch.autograd.grad(x.square().sum(), x, create_graph=True)
        return x + 0.1 * slope.detach()


class Talking(Model):
    """A model that trains on rows of its rank and gathers those of the other rank in its step."""

    def __init__(self, gradients: str, sharded: bool) -> None:
        super().__init__(make=norm_net)
        self.gradients, self.sharded = gradients, sharded
        if gradients == "in a layer":
            self.net.insert(1, Slope())
        self.seen: list[dict[str, Tensor]] = []

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if self.sharded and not isinstance(self.net, FSDPModule):
            fully_shard(self.net)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.gradients == "in the step":  # without gradients this fails
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(mse_loss(self.net(x), y), x)
            x = (x + 0.01 * slope.sign()).detach()
        out = self.net(x)
        mean = self.all_gather(out).mean()
        loss = mse_loss(out, y) + 0.1 * (out - mean.detach()).square().mean()
        self.log("train_loss", loss, sync_dist=True, on_epoch=True)
        return loss

    def train_dataloader(self):
        return DataLoader(_rows(self.global_rank), batch_size=None)

    def val_dataloader(self):
        return data(2, seed=1)

    def validation_step(self, batch, batch_idx) -> None:
        pass

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(_whole(self))

    def on_validation_end(self) -> None:
        pass


def _fit(buffers: Any, gradients: str, sharded: bool) -> list[Any]:
    torch.manual_seed(0)
    model = Talking(gradients, sharded)
    rank = torch.distributed.get_rank()
    loader = DataLoader(_rows(rank)[: 3 + 2 * rank], batch_size=None)  # three batches on one, five on the other
    average = WeightAveraging(SWA(), buffers=buffers, refresh_loader=loader)
    run = two_processes([average], sharded, val_check_interval=3, max_epochs=1)
    run.fit(model)
    return [_whole(model), model.seen, float(run.callback_metrics["train_loss"])]


@pytest.mark.parametrize("gradients", ["", "in the step", "in a layer"])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_steps_that_communicate(group: Group, kind: str, gradients: str) -> None:
    arguments = (gradients, kind == "FSDP2")
    refreshed, copied = group.run(_fit, "refresh", *arguments), group.run(_fit, "copy", *arguments)
    for one, other in zip(refreshed, copied, strict=True):
        assert len(one[1]) == 8
        for state, wanted in zip(one[1], other[1], strict=True):
            assert_equal(state, wanted)
        assert one[2] == other[2]
    assert_equal(refreshed[0][0], refreshed[1][0])
    wanted = norm_net()
    if not gradients:  # of three batches on each rank
        weights = {name.removeprefix("net."): tensor for name, tensor in refreshed[0][0].items()}
        wanted.load_state_dict(weights)
        refresh_batchnorm_(wanted, [torch.cat([x for rank in (0, 1) for x, _ in _rows(rank)[:3]])])
        assert_close(weights, wanted.state_dict(), ["1.running_mean", "1.running_var"])


class Broken(Talking):
    def training_step(self, batch, batch_idx):
        assert self.training or self.global_rank == 0, "only in training mode"
        return mse_loss(self.net(batch[0]), batch[1])


def _refused() -> None:
    two_processes([WeightAveraging(SWA())], sharded=False).fit(Broken("", False))


def test_what_fails_on_one_rank_is_refused_on_all(group: Group) -> None:
    with pytest.raises(JobFailed, match="a trial on one batch ended with: failed on another rank") as failed:
        group.run(_refused)
    assert "AssertionError: only in training mode" in str(failed.value)
