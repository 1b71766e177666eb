"""Folders of distributed checkpoints, read without running their metadata, which is a pickle."""

from __future__ import annotations

import dataclasses
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from lightning_optim import average_checkpoints, averaged_state_dict, cli

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _folder(path: Path, value: float) -> Path:
    state = {
        "w": torch.full((40,), value),
        "half": torch.full((3,), value).bfloat16(),
        "count": torch.tensor(int(value)),
    }
    dcp.save({"state_dict": state, "optimizer_0": {"state": {"w": {"step": 1.0}}}}, checkpoint_id=path, no_dist=True)
    torch.save({"pytorch-lightning_version": "2.6.6", "epoch": 3}, path / "meta.pt")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _folder(tmp_path / "folder.ckpt", 1.0)


def test_the_mean_of_folders(folder: Path, tmp_path: Path) -> None:
    mean = average_checkpoints([folder, _folder(tmp_path / "other.ckpt", 3.0)])
    assert {name: (value.flatten()[0].item(), value.dtype) for name, value in mean.items()} == {
        "w": (2.0, torch.float32),
        "half": (2.0, torch.bfloat16),
        "count": (3, torch.int64),
    }
    assert average_checkpoints([folder], weights_only=False).keys() == mean.keys()
    assert cli.main(["average", str(folder), "-o", str(tmp_path / "out.ckpt")]) == 0
    assert torch.load(tmp_path / "out.ckpt")["state_dict"]["w"].tolist() == [1.0] * 40


def test_folders_of_other_training_loops(tmp_path: Path) -> None:
    one, other = {"w": torch.ones(2)}, {"w": torch.full((2,), 5.0)}
    contents = {
        "model": ({"model": one, "optimizer": {"w": torch.zeros(2)}}, None, 1.0),
        "whole": (one, None, 1.0),
        "key": ({"state_dict": one, "teacher": other}, "teacher", 5.0),
    }
    for name, (content, key, value) in contents.items():
        dcp.save(content, checkpoint_id=tmp_path / name, no_dist=True)
        mean = average_checkpoints([tmp_path / name] * 2, key=key)
        assert {n: v.tolist() for n, v in mean.items()} == {"w": [value, value]}
    with pytest.raises(ValueError, match=r"key has no weights under `student`; there are \['state_dict', 'teacher'\]"):
        average_checkpoints([tmp_path / "key"], key="student")


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.makedirs, (self.path, 0o777, True)


def test_nothing_that_the_metadata_names_is_called(folder: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data["more"] = Harmful(tmp_path / "made")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=rf"{folder}/\.metadata is damaged, or hostile .*names os\.makedirs"):
        average_checkpoints([folder])
    assert not (tmp_path / "made").exists()
    average_checkpoints([folder], weights_only=False)
    assert (tmp_path / "made").exists()


_CLASS = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
METADATA = {
    "changes a class": b"\x80\x02" + _CLASS + b"N}X\x04\x00\x00\x00evilK\x01s\x86b.",
    "memo": b"\x80\x02}r" + struct.pack("<I", 1 << 28) + b".",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 30) + b".",
    "another name of the module": b"\x80\x04ctorch.distributed.checkpoint.filesystem\nos.mkdir\n.",
    "something else": pickle.dumps({"w": 1}),
    "text": b"no pickle",
    "empty": b"",
}


@pytest.mark.parametrize("what", METADATA)
def test_metadata_of_another_kind(what: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / ".metadata").write_bytes(METADATA[what])
    for command in (["inspect", str(folder)], ["average", str(folder), "-o", str(folder.parent / "out.ckpt")]):
        assert cli.main(command) == 1
        said = capsys.readouterr().err
        assert f"{folder}/.metadata is " in said and said.count("\n") == 1
    assert not hasattr(Metadata, "evil")


def _of_places(**changes: Any) -> Any:
    def change(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = dataclasses.replace(info, **changes)

    return change


def _of_weight(**changes: Any) -> Any:
    def change(metadata: Metadata) -> None:
        for name, value in changes.items():
            setattr(metadata.state_dict_metadata["state_dict.w"], name, value)

    return change


def _of_whole(**changes: Any) -> Any:
    return lambda metadata: metadata.__dict__.update(changes)


DESCRIPTIONS = {
    "larger": _of_weight(size=torch.Size([400])),
    "smaller": _of_weight(size=torch.Size([4])),
    "negative": _of_weight(size=torch.Size([-40])),
    "no parts": _of_weight(chunks=[]),
    "of no dtype": _of_weight(properties=3),
    "a tuple": _of_weight(size=(40, 1)),
    "longer": _of_places(length=1 << 62),
    "far": _of_places(offset=1 << 70),
    "before": _of_places(offset=-5),
    "text": _of_places(length="a"),
    "no path": _of_places(relative_path=3),
    "no name of a file": _of_places(relative_path="a\0b"),
    "nowhere": _of_whole(storage_data=None),
    "a list": _of_whole(state_dict_metadata=[1]),
    "numbers": _of_whole(state_dict_metadata={3: None}),
}


@pytest.mark.parametrize("weights_only", [True, False], ids=["weights only", "trusted"])
@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_descriptions_that_do_not_fit_together(what: str, weights_only: bool, folder: Path) -> None:
    """torch would return uninitialized memory for values that no file has, or allocate a wrong length."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    DESCRIPTIONS[what](metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=rf"^{folder}(/\.metadata)? is damaged"):
        average_checkpoints([folder], weights_only=weights_only)


def test_folders_that_are_damaged(folder: Path, tmp_path: Path) -> None:
    shards = next(folder.glob("*.distcp"))
    whole = shards.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(torch.full((40,), 1.0).numpy().tobytes()) + 5] ^= 1
    shards.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{shards} is damaged in its record"):
        average_checkpoints([folder])
    shards.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{folder} is damaged: '{shards.name}' is shorter"):
        average_checkpoints([folder])
    shards.unlink()
    with pytest.raises(ValueError, match=rf"{folder} is damaged \(FileNotFoundError"):
        average_checkpoints([folder])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"{tmp_path}/empty is a folder, and no distributed checkpoint"):
        average_checkpoints([tmp_path / "empty"])


def test_a_folder_reads_nothing_outside_of_it(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=rf"{folder} names a file outside of it"):
        average_checkpoints([folder])


def test_an_average_that_lies_in_a_folder(folder: Path) -> None:
    """The average is saved as shards beside those of the optimizers, from which a run resumes."""
    with pytest.raises(ValueError, match=rf"{folder} is a folder.* `average_checkpoints\(\[path\]\)`"):
        averaged_state_dict(folder)
