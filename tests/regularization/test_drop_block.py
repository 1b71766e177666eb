"""DropBlock: blocks counted by hand, the share that is dropped, the scale, and maps smaller than a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import DropBlock, ScheduledDropout
from lightning_optim.regularization.dropout import masks
from lightning_optim.regularization.dropout.masks import block_mask, covered
from tests.lightning import MisconfigurationException
from tests.regularization.test_compiled_dropout import MAPS, Net, Trainer


def test_blocks_by_hand() -> None:
    seeds = torch.zeros(1, 1, 3, 3)
    seeds[0, 0, 0, 2] = seeds[0, 0, 1, 0] = 1.0
    wanted = torch.tensor(
        [
            [0.0, 0.0, 1.0, 1.0, 1.0],
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [1.0, 1.0, 1.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    assert torch.equal(covered(seeds, 3)[0, 0], wanted)


def test_an_even_block_by_hand() -> None:
    seeds = torch.zeros(1, 1, 2, 2)
    seeds[0, 0, 1, 1] = 1.0
    assert covered(seeds, 2)[0, 0].tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_values_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed draw: with p = 0.25, b = 2 and maps of 3 × 3, gamma is 0.25 / 4 · 9 / 4 = 9 / 64 = 0.140625."""
    drawn = torch.tensor([[[[0.14, 0.15], [0.5, 0.9]], [[0.2, 0.2], [0.2, 0.2]]]])
    monkeypatch.setattr(masks.torch, "rand", lambda shape, device: drawn if tuple(shape) == (1, 2, 2, 2) else None)
    x = torch.arange(18.0).reshape(1, 2, 3, 3)
    y = DropBlock(0.25, 2)(x)
    scale = 18 / 14  # four of 18 are dropped
    first = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 5.0], [6.0, 7.0, 8.0]]) * scale
    assert torch.allclose(y[0, 0], first) and torch.allclose(y[0, 1], x[0, 1] * scale)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_share_that_is_dropped(size: int) -> None:
    """It is near p where blocks rarely overlap, and their number that of gamma."""
    torch.manual_seed(0)
    kept = block_mask(torch.empty(100, 20, 20, 14), 0.05, size)
    share = (kept == 0).float().mean().item()
    assert share == pytest.approx(0.05, rel=0.1)
    assert kept.mean().item() == pytest.approx(1.0, abs=1e-5) and len(kept.unique()) == 2


def test_each_channel_and_sample_has_its_own_blocks() -> None:
    torch.manual_seed(0)
    kept = block_mask(torch.empty(4, 4, 12, 12), 0.3, 3).flatten(2)
    assert not (kept[:, :1] == kept).all(-1)[:, 1:].any() and not (kept[:1] == kept).all(-1)[1:].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 9)])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("in_tensor", [False, True])
def test_a_map_smaller_than_a_block(shape: tuple[int, int], rate: float, in_tensor: bool) -> None:
    kept = block_mask(torch.empty(50, 4, *shape), torch.tensor(rate) if in_tensor else rate, 7)
    assert kept.shape == (50, 4, *shape) and kept.isfinite().all()
    assert kept.mean().item() == pytest.approx(float(rate < 1.0), abs=1e-5)
    assert (rate in (0.0, 1.0)) is (len(kept.unique()) == 1)


def test_it_acts_in_training_alone_and_takes_maps_alone() -> None:
    layer, x = DropBlock(0.9, 2), torch.ones(2, 3, 8, 8)
    assert not torch.equal(layer(x), x) and torch.equal(layer.eval()(x), x)
    assert layer(x.half()).dtype == torch.float16
    with pytest.raises(ValueError, match=r"\[N, C, H, W\], got \[2, 3\]"):
        DropBlock(0.1)(torch.ones(2, 3))
    assert repr(layer) == "DropBlock(drop_prob=0.9, block_size=2)"


# ---- inserted --------------------------------------------------------------------------------------------------------


class Images(Net):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)), MAPS)
        self.head = nn.Linear(2, 2)
        self.masks: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        outputs = self.net[0](batch)
        self.masks.append(outputs != 0.0)
        return self.head(self.net(batch).mean((2, 3))).square().mean()


def fit(model: Any, callback: ScheduledDropout) -> None:
    Trainer(max_epochs=1, barebones=True, callbacks=[callback]).fit(model)


def test_inserted_blocks() -> None:
    callback, model = ScheduledDropout(0.3, insert="block", block_size=3), Images()
    fit(model, callback)
    assert callback.rates_by_module() == {"net.0": 0.3, "net.2": 0.3}  # convolutions, of which neither is the last
    dropped = ~torch.cat(model.masks).flatten(0, 1)  # [maps, 6, 6]
    assert 0.1 < dropped.float().mean().item() < 0.4
    rows = dropped.float()
    assert torch.equal(rows, covered(erode(rows), 3)), "zeros that are no union of blocks"
    assert not any(module._forward_hooks for module in model.modules())


def erode(zeros: Tensor) -> Tensor:
    """Return where a block of three fits into the zeros."""
    return 1.0 - nn.functional.max_pool2d(1.0 - zeros, 3, stride=1)


def test_blocks_of_a_vector_are_refused_with_the_name_of_its_module() -> None:
    with pytest.raises(MisconfigurationException, match=r"'head' returns \[4, 2\]"):
        fit(Images(), ScheduledDropout({"head": 0.3}, insert="block"))
    with pytest.raises(ValueError, match=r"matches \['head'\], of which none is a convolution"):
        fit(Images(), ScheduledDropout({"he*": 0.3}, insert="block"))
