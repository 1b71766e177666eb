"""Test that the weights of a checkpoint, a file or a folder of shards, are copied by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from lightning_optim.runtime.files.saved_weights import load_weights_


def weights() -> dict[str, Tensor]:
    return {"0.weight": torch.full((2, 3), 7.0), "0.bias": torch.full((2,), 8.0)}


def module() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    nn.init.ones_(made[0].weight)
    return made


def write(path: Path, state: Any, folder: bool) -> str:
    if folder:
        dcp.save({"state_dict": state}, checkpoint_id=path)
    else:
        torch.save({"state_dict": state}, path)
    return str(path)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_are_copied_by_name(compiled: bool, folder: bool, tmp_path: Path) -> None:
    """Ignore what only one of the two has, and the names that `torch.compile` adds."""
    prefix = "_orig_mod." if compiled else ""
    state = {f"{prefix}{name}": value for name, value in weights().items()} | {"other": torch.ones(4)}
    target = module()
    storage = target[0].weight.data_ptr()
    load_weights_(target, write(tmp_path / "a.ckpt", state, folder))
    assert torch.equal(target[0].weight, weights()["0.weight"]) and target[0].weight.data_ptr() == storage
    assert torch.equal(target[0].bias, weights()["0.bias"])
    assert torch.equal(target[1].weight, torch.ones(2)), "the checkpoint does not have it"


@pytest.mark.parametrize("folder", [False, True])
def test_a_checkpoint_of_another_model_changes_nothing(folder: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", weights() | {"0.weight": torch.full((2, 4), 7.0)}, folder)
    target = module()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"a.ckpt is of another model: its 0.weight has .* module.s \(2, 3\)"):
        load_weights_(target, path)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_a_tensor_that_cannot_be_written_is_left(tmp_path: Path) -> None:
    target = module()
    target[0].bias = nn.Parameter(torch.ones(1).expand(2), requires_grad=False)
    load_weights_(target, write(tmp_path / "a.ckpt", weights(), False))
    assert torch.equal(target[0].bias, torch.ones(2)) and torch.equal(target[0].weight, weights()["0.weight"])


@pytest.mark.parametrize("content", [3, {"weights": {}}, {"state_dict": 3}])
def test_a_file_without_weights_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt is no checkpoint of Lightning: it has no `state_dict`"):
        load_weights_(module(), str(tmp_path / "a.ckpt"))


def test_a_folder_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", weights(), True)
    (tmp_path / "a.ckpt" / ".metadata").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"a.ckpt is damaged"):
        load_weights_(module(), path)
