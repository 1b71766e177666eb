"""Test the files of fit_members: a damaged one is trained again or refused, and no other file is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import Ensemble, fit_members
from lightning_optim.ensembling.fit_members import member_seed
from tests.ensembling.test_fit_members import Makes, Net, make_member, same, shuffling, weights
from tests.lightning import AsyncCheckpointIO, Callback, Trainer


def fit(folder: Path, makes: Makes, size: int = 2) -> list[str]:
    return fit_members(make_member, size, makes, shuffling(), dirpath=folder)


def entry(index: Any) -> dict[str, Any]:
    return {"seed": 0, "members": [{"index": index}]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"seed": 0, "members": [{"ind',
        "[]",
        "3",
        "null",
        "{}",
        '{"seed": 0, "members": 3}',
        '{"seed": 0, "members": [3]}',
        '{"seed": "0", "members": []}',
        *map(json.dumps, map(entry, (-1, "0", 0.0, None, True, [0]))),
        json.dumps({"seed": 0, "members": [{"index": 0}, {"index": 0}]}),
        "[" * 100_000,
        b"\xff\xfe\x00",
    ],
    ids=lambda content: str(content)[:30],
)
def test_a_list_of_members_that_is_damaged_is_refused_by_its_name(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    makes = Makes()
    with pytest.raises(ValueError, match=r"members.json is damaged or is not a list of members .*: delete it"):
        fit(tmp_path, makes)
    assert makes.trainers == []


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut off", "flipped"])
def test_a_finished_member_whose_file_is_damaged_is_trained_again(damage: str, tmp_path: Path) -> None:
    paths = fit(tmp_path, Makes(enable_checkpointing=False))
    expected, path = weights(paths), Path(paths[1])
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        storage = torch.load(path)["state_dict"]["net.0.weight"].numpy().tobytes()
        content[content.index(storage) + 3] ^= 1
        assert not same([torch.load(path)["state_dict"]], [_after(path, content)["state_dict"]]), "torch sees nothing"
    else:
        content = {"garbage": b"garbage", "empty": b"", "cut off": bytes(content[:-300])}[damage]
        path.write_bytes(content)
    makes = Makes(enable_checkpointing=False)
    with pytest.warns(UserWarning, match=r"member-1.ckpt .*: member 1 is trained again"):
        assert same(weights(fit(tmp_path, makes)), expected)
    assert len(makes.trainers) == 1


def _after(path: Path, content: bytearray) -> Any:
    path.write_bytes(content)
    return torch.load(path)


def test_a_damaged_checkpoint_is_skipped_for_an_older_one(tmp_path: Path) -> None:
    expected = weights(fit(tmp_path / "whole", Makes(), 1))
    fit(tmp_path / "other", Makes(), 1)
    (tmp_path / "other" / "members.json").unlink()
    (path,) = (tmp_path / "other" / "member-0").glob("*.ckpt")
    content = bytearray(path.read_bytes())
    storage = torch.load(path, weights_only=False)["state_dict"]["net.0.weight"].numpy().tobytes()
    content[content.index(storage) + 3] ^= 1
    path.write_bytes(content)
    torch.save([1], path.with_name("a.ckpt"))
    makes = Makes()
    with pytest.warns(UserWarning, match=r"cannot be read, and is skipped: .*is damaged in its record"):
        assert same(weights(fit(tmp_path / "other", makes, 1)), expected)
    assert makes.trainers[0].ckpt_path is None


def test_links_are_not_followed_and_no_other_file_is_left(tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "members"
    precious.write_text("precious")
    folder.mkdir()
    for name in ("members.part", "member-0.part", "members.new"):
        (folder / name).symlink_to(precious)
    fit(folder, Makes(enable_checkpointing=False), 1)
    assert precious.read_text() == "precious"
    names = {path.name for path in folder.iterdir() if not path.is_symlink()}
    assert names == {"members.json", "member-0.ckpt"}


class Broken(Net):
    """Put an object into the checkpoint that cannot be pickled."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["local"] = lambda: None


def test_a_member_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        fit_members(lambda index: Broken(), 1, Makes(enable_checkpointing=False), shuffling(), dirpath=tmp_path)
    assert list(tmp_path.iterdir()) == []


class Looks(Callback):
    """Load the first member's checkpoint when the second one begins."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        path = Path(trainer.default_root_dir) / "member-0.ckpt"
        self.found = torch.load(path)["state_dict"] if path.exists() else None


def test_a_file_is_there_before_the_next_member_begins_also_with_asynchronous_plugins(tmp_path: Path) -> None:
    makes = Makes(Looks, plugins=[AsyncCheckpointIO()], default_root_dir=tmp_path, enable_checkpointing=False)
    paths = fit(tmp_path, makes)
    looks = [callback for trainer in makes.trainers for callback in trainer.callbacks if isinstance(callback, Looks)]
    assert looks[0].found is None and same([looks[1].found], weights(paths)[:1])
    assert all(isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO) for trainer in makes.trainers)


def test_hyper_parameters_of_any_kind_do_not_make_a_member_new(tmp_path: Path) -> None:
    def make(index: int) -> Net:
        member = Net()
        member.hparams["anything"] = Path("anything")
        return member

    makes = Makes(enable_checkpointing=False)
    for _ in range(2):
        paths = fit_members(make, 1, makes, shuffling(), dirpath=tmp_path)
    assert len(makes.trainers) == 1
    ensemble = Ensemble.from_checkpoints(Net, paths, outputs="values", on="net", weights_only=False)
    assert same([ensemble.members[0].state_dict()], [torch.load(paths[0], weights_only=False)["state_dict"]])


def test_the_list_of_members(tmp_path: Path) -> None:
    fit(tmp_path, Makes(enable_checkpointing=False), 1)
    written = json.loads((tmp_path / "members.json").read_text())
    (member,) = written["members"]
    assert written["seed"] == 0 and {key: member[key] for key in ("index", "seed", "file", "epochs")} == {
        "index": 0,
        "seed": member_seed(0, 0),
        "file": "member-0.ckpt",
        "epochs": 3,
    }
