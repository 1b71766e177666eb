"""Files yield the values that ``torch.load`` reads, and none of their code is run."""

from __future__ import annotations

import enum
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_optim import average_checkpoints, average_weights
from lightning_optim.runtime.files import safe_reading
from tests.averaging.memory import peak_over_start
from tests.averaging.models import assert_equal

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int32]


def _state(seed: int) -> dict[str, Tensor]:
    """Return tensors of alternating dtypes; some are empty, some scalars, some views of others."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for index, shape in enumerate([(7, 5), (), (0, 3), (3, 0), (33,), (2, 1, 4), (1, 1)]):
        for dtype in DTYPES:
            values = 8 * torch.randn(shape, generator=generator)
            state[f"{dtype}.{index}".replace("torch.", "")] = values.to(dtype)
    state["flags"] = torch.rand(5, generator=generator) > 0.5
    state["bytes"] = torch.arange(3, dtype=torch.uint8) + seed
    for index in range(20):
        state[f"layer{index}.weight"] = torch.randn(5, index + 1, generator=generator)
    return state


def _tied(seed: int) -> dict[str, Any]:
    state = _state(seed)
    state["tied"] = state["layer3.weight"]
    state["rows"] = state["layer3.weight"][1:3]  # dense, in the middle of a storage
    state["parameter"] = nn.Parameter(state["layer4.weight"] + 1.0)
    return state


class OptionsDict(dict[str, Any]):
    """Hyper-parameters of a package."""


class Kind(enum.Enum):
    """An enumeration, whose members are pickled by a call."""

    ONE = 1


class Encoder:
    """An object with a state, which counts how often one is made."""

    made = 0

    def __new__(cls) -> Encoder:
        cls.made += 1
        return super().__new__(cls)

    def __reduce__(self) -> Any:
        return Encoder, (), {"scale": np.ones(3)}


OBJECTS: dict[str, Any] = {
    "an object": lambda: Encoder(),
    "an array": lambda: np.arange(3.0),
    "a dictionary": lambda: OptionsDict(lr=0.1, encoder=Encoder()),
    "an enumeration": lambda: {Kind.ONE: Kind.ONE},
    "a module": lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
    "a function": lambda: (average_weights, {"path": Path("/somewhere")}),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_weights_are_read_beside_objects_that_are_never_made(name: str, tmp_path: Path) -> None:
    state, path = _tied(0), tmp_path / "a.ckpt"
    torch.save({"hyper_parameters": {"one": OBJECTS[name](), "lr": 0.1}, "state_dict": state}, path)
    made = Encoder.made
    found = safe_reading.load(path, skip_objects=True)
    assert_equal(found["state_dict"], state)
    assert found["hyper_parameters"]["lr"] == 0.1
    assert Encoder.made == made
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        safe_reading.load(path)


class Command:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_command_is_neither_run_nor_left_out(tmp_path: Path) -> None:
    torch.save({"more": Command(tmp_path / "made"), "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        safe_reading.load(tmp_path / "a.ckpt", skip_objects=True)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("weights", [None, [0.0, 3.0, 1.0], [1.0, 0.0, 0.0]], ids=str)
@pytest.mark.parametrize("kind", ["ckpt", "plain", "safetensors", "both"])
def test_the_mean_of_what_they_hold(kind: str, weights: Any, tmp_path: Path) -> None:
    states = [_state(seed) if kind in ("safetensors", "both") else _tied(seed) for seed in range(3)]
    paths = []
    for index, state in enumerate(states):
        if kind == "safetensors" or (kind == "both" and index == 1):
            paths.append(tmp_path / f"{index}.safetensors")
            save_file(state, paths[-1])
        else:
            paths.append(tmp_path / f"{index}.ckpt")
            torch.save({"epoch": 3, "state_dict": state} if kind == "ckpt" else state, paths[-1])
    mean = average_checkpoints(paths, weights)
    assert_equal(mean, average_weights(states, weights))
    if kind != "safetensors":
        assert list(mean) == list(states[-1])
    if "tied" in mean:
        assert mean["tied"] is mean["layer3.weight"]
    # To save one must not save the stretch that it was averaged in.
    assert all(value.untyped_storage().nbytes() == value.numel() * value.itemsize for value in mean.values())


def test_the_rest_of_a_checkpoint_does_not_count(tmp_path: Path) -> None:
    rest = {"epoch": 3, "optimizer_states": [{"state": {0: {"m": torch.ones(3, 2).t()}}}], "loops": {"a": (1, None)}}
    paths = [tmp_path / f"{index}.ckpt" for index in range(2)]
    for index, path in enumerate(paths):
        torch.save({**rest, "state_dict": _tied(index), "padding": torch.ones(100 * index + 1)}, path)
    assert_equal(average_checkpoints(paths), average_weights([_tied(0), _tied(1)]))


SORTS = {
    "not dense": lambda: {"w": torch.arange(6.0).view(2, 3).t()},
    "expanded": lambda: {"w": torch.ones(1).expand(4)},
    "no tensor": lambda: {"w": torch.ones(2), "_extra_state": {"scale": 2.0}},
    "conjugated": lambda: {"w": torch.randn(3, dtype=torch.complex64).conj()},
    "float8": lambda: {"w": torch.randn(3).to(torch.float8_e4m3fn)},
    "a size": lambda: {"w": torch.ones(2), "of": torch.Size([2])},
}


@pytest.mark.parametrize("what", SORTS)
def test_tensors_of_all_sorts(what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = [SORTS[what]() for _ in range(2)]
    paths = [tmp_path / f"{index}.pt" for index in range(2)]
    for state, path in zip(states, paths, strict=True):
        torch.save(state, path)
    mean, wanted = average_checkpoints(paths), average_weights(states)
    assert mean.keys() == wanted.keys()
    assert torch.equal(mean["w"].to(torch.complex64), wanted["w"].to(torch.complex64))


def test_ties_that_differ(tmp_path: Path) -> None:
    weight = torch.tensor([1.0, 2.0])
    states = [{"a": weight, "b": weight}, {"a": weight + 1.0, "b": weight + 3.0}]
    paths = [tmp_path / f"{index}.pt" for index in range(2)]
    for state, path in zip(states, paths, strict=True):
        torch.save(state, path)
    for order in (1, -1):
        assert_equal(average_checkpoints(paths[::order]), {"a": weight + 0.5, "b": weight + 1.5})


@pytest.mark.parametrize(("kind", "count"), [("ckpt", 3), ("ckpt", 12), ("safetensors", 12)])
def test_memory_is_the_mean_and_one_file(kind: str, count: int, tmp_path: Path) -> None:
    """Also resident memory, which counts the pages of mapped files."""
    generator, paths = torch.Generator().manual_seed(0), []
    for index in range(count):
        state = {f"layer{layer}": torch.randn(1 << 16, generator=generator) for layer in range(32)}  # 8 MB
        paths.append(tmp_path / f"{index}.{kind}")
        save_file(state, paths[-1]) if kind == "safetensors" else torch.save({"state_dict": state}, paths[-1])
    average_checkpoints(paths[:2])
    assert peak_over_start(lambda: average_checkpoints(paths)) < 2.5 * 8.4


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)

    def __init__(self, path: str) -> None:
        self.path = path


@pytest.mark.parametrize("where", ["in the weights", "beside them"])
def test_nothing_that_a_file_names_is_called(where: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    harmful = Harmful(str(made))
    state = {"w": torch.ones(2)} | ({"harmful": harmful} if where == "in the weights" else {})
    path = tmp_path / "harmful.ckpt"
    torch.save({"state_dict": state, "harmful": harmful}, path)
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        average_checkpoints([path, path])
    assert not made.exists()


def test_a_header_of_odd_length(tmp_path: Path) -> None:
    """The format allows it, and the elements cannot be mapped then."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (5 - len(header) % 4)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f" * 2)
    assert average_checkpoints([path, path])["w"].tolist() == [1.0, 1.0]


def test_files_that_are_not_on_the_local_disk(tmp_path: Path) -> None:
    import fsspec

    remote = fsspec.filesystem("memory")
    states = [{"w": torch.full((3,), value)} for value in (1.0, 3.0, 5.0)]
    for index, state in enumerate(states[:2]):
        with remote.open(f"/files/{index}.ckpt", "wb") as file:
            torch.save({"state_dict": state}, file)
    with remote.open("/files/2.safetensors", "wb") as file:
        save_file(states[2], tmp_path / "2.safetensors")
        file.write((tmp_path / "2.safetensors").read_bytes())
    paths = ["memory://files/0.ckpt", "memory://files/1.ckpt", "memory://files/2.safetensors"]
    assert average_checkpoints(paths)["w"].tolist() == [3.0, 3.0, 3.0]
    with remote.open("/files/1.ckpt", "wb") as file:
        file.write(b"no checkpoint")
    with pytest.raises(ValueError, match=r"memory://files/1\.ckpt is no checkpoint"):
        average_checkpoints(paths)
    with pytest.raises(FileNotFoundError):
        average_checkpoints(["memory://files/none.ckpt"])


def test_another_protocol_of_pickle(tmp_path: Path) -> None:
    """The file is undamaged, and torch reads it only with ``weights_only=False``."""
    path = tmp_path / "a.ckpt"
    torch.save({"w": torch.ones(2), "names": ["a"] * 3}, path, pickle_protocol=4)
    with pytest.raises(ValueError, match=r"a\.ckpt holds more than tensors.* pass `weights_only=False`"):
        average_checkpoints([path])
    assert average_checkpoints([path], weights_only=False)["w"].tolist() == [1.0, 1.0]
