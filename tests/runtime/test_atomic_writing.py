"""Test that a full disk, an exception, a kill, a link or a folder leave either the whole output or none."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_optim import cli
from lightning_optim.runtime.files import atomic_writing
from lightning_optim.runtime.files.atomic_writing import write_atomically

BEFORE = {"w": torch.full((5,), 7.0)}


@pytest.fixture(params=["unnamed", "copied", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write with an unnamed file, with one that the file system cannot link, and without unnamed files."""

    def cannot_link(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if request.param == "named":
        monkeypatch.setattr(atomic_writing, "_open_unnamed", lambda folder: None)
    elif request.param == "copied":
        monkeypatch.setattr(atomic_writing, "_link", cannot_link)
    return request.param


def _write(path: Path, text: str) -> None:
    with write_atomically(path) as beside, open(beside, "w") as file:
        file.write(text)


def test_new_and_replaced(way: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    before = os.umask(0o027)
    try:
        _write(path, "one")
    finally:
        os.umask(before)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("one", 0o640)
    path.chmod(0o604)
    _write(path, "two")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("two", 0o604)
    assert os.listdir(tmp_path) == ["out"]


def test_readers_see_the_old_or_the_new(way: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    with path.open(), write_atomically(path) as beside:
        Path(beside).write_text("new")
        assert path.read_text() == "old"
        assert len(os.listdir(tmp_path)) == (2 if way == "named" else 1)
    with path.open() as later:
        assert later.read() == "new"


def test_two_at_once(way: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with write_atomically(path) as one, write_atomically(path) as other:
        Path(one).write_text("one")
        Path(other).write_text("other")
    assert (path.read_text(), os.listdir(tmp_path)) == ("one", ["out"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_what_was(error: type[BaseException], way: str, tmp_path: Path) -> None:
    for content in (None, "old"):
        if content:
            (tmp_path / "out").write_text(content)
        with pytest.raises(error), write_atomically(tmp_path / "out") as beside:
            Path(beside).write_text("half")
            raise error("in the middle")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"out": content} if content else {})


def test_links_keep_their_place(way: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "link").symlink_to("there/file")
    (tmp_path / "second").symlink_to("link")
    _write(tmp_path / "link", "through a link to nothing")
    assert (there / "file").read_text() == "through a link to nothing"
    _write(tmp_path / "second", "through two")
    assert (there / "file").read_text() == "through two"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
    assert (sorted(os.listdir(tmp_path)), os.listdir(there)) == (["link", "second", "there"], ["file"])


def test_what_is_no_file_is_refused(way: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, error in (("folder", IsADirectoryError), ("pipe", OSError), ("none/out", FileNotFoundError)):
        with pytest.raises(error, match=name.split("/")[0]), write_atomically(tmp_path / name):
            raise AssertionError("nothing is written")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_name_that_is_too_long_is_said_and_no_other(way: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File name too long") as raised:
        _write(tmp_path / ("x" * 300), "text")
    assert raised.value.filename == str(tmp_path / ("x" * 300))
    assert ".lightning-optim" not in str(raised.value)
    assert os.listdir(tmp_path) == []


# ---- full disks ------------------------------------------------------------------------------------------------------


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[int]:
    """Mount a file system of this size, or else limit the size of a file; yield the errno."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield errno.ENOSPC
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(suffix: str, exists: bool, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk").mkdir()
    torch.save({"w": torch.randn(100_000)}, tmp_path / "in.ckpt")
    out = tmp_path / "disk" / f"out.{suffix}"
    with _small_disk(tmp_path / "disk", 256 << 10) as reason:
        if exists:
            torch.save(BEFORE, out)
        assert cli.main(["average", str(tmp_path / "in.ckpt"), "-o", str(out), "--force"]) == 1
        said = capsys.readouterr().err
        assert said == f"lightning-optim: {out}: {os.strerror(reason)}\n"
        assert os.listdir(tmp_path / "disk") == ([out.name] if exists else [])
        if exists:
            assert torch.equal(torch.load(io.BytesIO(out.read_bytes()))["w"], BEFORE["w"])


# ---- kills -----------------------------------------------------------------------------------------------------------

_WRITER = """
import importlib.util
import sys

spec = importlib.util.spec_from_file_location("atomic_writing", sys.argv[1])  # alone: torch takes seconds
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for round in range(1, 255):
    with module.write_atomically(sys.argv[2]) as beside, open(beside, "wb", buffering=0) as file:
        for piece in range(64):
            file.write(bytes([round]) * (64 << 10))
            print(round, piece, flush=True)
            sys.stdin.readline()
"""


def test_a_kill_leaves_the_previous_output_and_nothing_else(tmp_path: Path) -> None:
    """Kill six times while 4 MB are written, each time over the output of the round before."""
    code, out = tmp_path / "writer.py", tmp_path / "folder" / "out"
    code.write_text(_WRITER)
    out.parent.mkdir()
    for moment in ("1 0", "1 40", "1 63", "2 0", "2 33", "3 63"):
        out.unlink(missing_ok=True)
        command = [sys.executable, str(code), atomic_writing.__file__, str(out)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            while process.stdout.readline().strip() != moment:
                process.stdin.write("\n")  # an error, and not a wait, if the writer has ended
                process.stdin.flush()
            process.send_signal(signal.SIGKILL)
        before = int(moment.split()[0]) - 1
        assert os.listdir(out.parent) == (["out"] if before else [])
        assert not before or out.read_bytes() == bytes([before]) * (4 << 20)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"{name}.ckpt") for name in "AB"]
    for path, value in zip(paths, (1.0, 3.0), strict=True):
        torch.save({"state_dict": {"w": torch.full((2,), value)}, "pytorch-lightning_version": "2.6.6"}, path)
    return paths


def _mean(path: str | Path) -> list[float]:
    return torch.load(path)["state_dict"]["w"].tolist()


def test_the_command_writes_nothing_beside(two: list[str], tmp_path: Path) -> None:
    (tmp_path / "D.ckpt.new").write_text("precious")
    os.rename(two[1], f"{two[0]}.new")
    assert cli.main(["average", two[0], f"{two[0]}.new", "-o", str(tmp_path / "D.ckpt")]) == 0
    assert cli.main(["average", two[0], f"{two[0]}.new", "-o", two[0], "--force"]) == 0
    assert _mean(tmp_path / "D.ckpt") == _mean(two[0]) == [2.0, 2.0]
    assert (tmp_path / "D.ckpt.new").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["A.ckpt", "A.ckpt.new", "D.ckpt", "D.ckpt.new"]


def test_the_command_keeps_a_link(two: list[str], tmp_path: Path) -> None:
    link = tmp_path / "link.ckpt"
    link.symlink_to("A.ckpt")
    assert cli.main(["average", *two, "-o", str(link)]) == 1
    assert cli.main(["average", *two, "-o", str(link), "--force"]) == 0
    assert link.is_symlink() and _mean(two[0]) == [2.0, 2.0]


def test_a_folder_in_which_nothing_can_be_written(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["average", *two, "-o", "/sys/out.ckpt"]) == 1  # not even by root
    said = capsys.readouterr().err
    assert said.startswith("lightning-optim: /sys/out.ckpt: ") and said.count("\n") == 1


@pytest.mark.parametrize("name", ["folder", "folder/", "none/out.ckpt"])
def test_the_command_refuses_before_it_reads(
    name: str, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    assert cli.main(["average", two[0], str(tmp_path / "missing"), "-o", str(tmp_path / name), "--force"]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / name) in said and "missing" not in said
    assert sorted(os.listdir(tmp_path)) == before and not os.listdir(tmp_path / "folder")


def test_safetensors_are_what_the_library_reads(two: list[str], tmp_path: Path) -> None:
    state = {
        "even": torch.arange(6.0).view(2, 3).t(),
        "odd": torch.arange(3, dtype=torch.uint8),
        "levels": {"half": torch.randn(5).bfloat16(), "empty": torch.empty(0, 2), "scalar": torch.tensor(2.0)},
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
    }
    torch.save(state, tmp_path / "in.ckpt")
    out = tmp_path / "out.safetensors"
    assert cli.main(["average", str(tmp_path / "in.ckpt"), "-o", str(out)]) == 0
    wanted = {**{name: value for name, value in state.items() if name != "levels"}}
    wanted |= {f"levels.{name}": value for name, value in state["levels"].items()}
    found = load_file(out)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
