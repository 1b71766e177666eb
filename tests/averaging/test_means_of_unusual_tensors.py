"""Averages of weights that are sharded, infinite or sparse, and of values that are not weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import EMA, WeightAveraging, average_checkpoints, average_weights, averaged_state_dict
from tests.harness.process_group import Group
from tests.lightning import BoringModel, Trainer


def _net(seed: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(1, 1)).to(dtype)


def _mean_of_sharded(dtype: torch.dtype, tied: bool) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    nets = [_net(seed, dtype) for seed in range(3)]
    for net in nets:
        if tied:
            net[1].weight = net[0].weight
        fully_shard(net)
    mean: dict[str, Any] = average_weights(nets, [1, 2, 3])
    return {name: value.full_tensor() for name, value in mean.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sharded_models_have_the_mean_of_whole_ones(dtype: torch.dtype, tied: bool, group: Group) -> None:
    wanted = average_weights([_net(seed, dtype) for seed in range(3)], [1, 2, 3])
    if tied:
        wanted["1.weight"] = wanted["0.weight"]
    for mean in group.run(_mean_of_sharded, dtype, tied):
        torch.testing.assert_close(mean, dict(wanted), rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_infinities_stay_as_in_a_mask_of_attention(dtype: torch.dtype) -> None:
    inf = math.inf
    values = [[-inf, 1.0, inf, 0.1], [-inf, 5.0, inf, 0.1], [-inf, inf, 2.0, 0.1]]
    mean = average_weights([{"mask": torch.tensor(row).to(dtype)} for row in values])["mask"]
    assert mean.tolist()[:3] == [-inf, inf, inf]
    assert mean[3] == torch.tensor(0.1).to(dtype)
    opposite = [{"mask": torch.tensor([inf, 1.0])}, {"mask": torch.tensor([-inf, 2.0])}]
    assert average_weights(opposite)["mask"].isnan().tolist() == [True, False]


class _Sparse(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(3).to_sparse())


def test_the_average_in_a_checkpoint_of_a_model_with_a_sparse_buffer(tmp_path) -> None:
    averages = [WeightAveraging(EMA(0.5), name="short"), WeightAveraging(EMA(0.9), name="long", evaluate=False)]
    trainer = Trainer(max_steps=4, callbacks=averages, barebones=True)
    trainer.fit(_Sparse())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = averaged_state_dict(tmp_path / "a.ckpt", "long")
    assert state["adjacency"].to_dense().tolist() == torch.eye(3).tolist()


def test_weights_whose_sum_is_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`weights` must be 2 numbers >= 0, not all zero, with a finite sum, got"):
        average_weights([{"a": torch.ones(1)}] * 2, [1e308, 1e308])


@pytest.mark.parametrize("weights", ["ab", [[1], [2]], [None, 1], 3], ids=str)
def test_weights_that_are_no_numbers_are_refused(weights: Any) -> None:
    with pytest.raises(ValueError, match="`weights` must be 2 numbers >= 0"):
        average_weights([{"a": torch.ones(1)}] * 2, weights)


@pytest.mark.parametrize("models", [3, [None], ["a.ckpt"], [{"a": torch.ones(1)}, 3]], ids=str)
def test_what_is_no_model_is_refused(models: Any) -> None:
    with pytest.raises(ValueError, match="`models_or_state_dicts` must be a list of modules or state dicts, got a"):
        average_weights(models)


@pytest.mark.parametrize("paths", ["a.ckpt", Path("a.ckpt"), [3], [None]], ids=str)
def test_arguments_that_are_not_paths_are_refused(paths: Any) -> None:
    with pytest.raises(ValueError, match="`paths` must be a list of paths, got"):
        average_checkpoints(paths)
