"""Damaged, foreign and hostile files yield the right values, or an error that names the file."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from lightning_optim import average_checkpoints, cli, greedy_soup
from lightning_optim.runtime.files import safe_reading
from tests.averaging.memory import peak_over_start

_generator = torch.Generator().manual_seed(0)
STATE = {
    "weight": torch.randn(7, 5, generator=_generator),
    "bias": torch.randn(7, generator=_generator),
    "half": torch.randn(9, generator=_generator).bfloat16(),
    "count": torch.tensor(3),
}
LIGHTNING = {
    "epoch": 1,
    "pytorch-lightning_version": "2.6.6",
    "state_dict": STATE,
    "optimizer_states": [{"state": {0: {"momentum": torch.ones(20)}}, "param_groups": [{"lr": 0.1}]}],
}


def _saved(content: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def _zipped(
    content: bytes, method: int = zipfile.ZIP_STORED, put: dict[str, bytes] | None = None, drop: str = ""
) -> bytes:
    """Write an archive again, with other contents of some records."""
    written, put = io.BytesIO(), put or {}
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w", method) as new:
        for record in old.infolist():
            name = record.filename.split("/", 1)[1]
            if name != drop:
                new.writestr(record.filename, put.get(name, old.read(record)))
    return written.getvalue()


PLAIN, OLD = _saved(STATE), _saved(STATE, _use_new_zipfile_serialization=False)
ARCHIVES = {
    "plain": PLAIN,
    "lightning": _saved(LIGHTNING),
    "compressed": _zipped(_saved(LIGHTNING), zipfile.ZIP_DEFLATED),
    "zipped anew": _zipped(_saved(LIGHTNING)),
}


def _outcome(path: Path, content: bytes) -> str:
    """Return ``right``, ``refused`` if one line names the file, or else the values or the error."""
    path.write_bytes(content)
    try:
        mean = average_checkpoints([path])
    except ValueError as error:
        return "refused" if str(path) in str(error) and "\n" not in str(error) else f"says {error}"
    return "right" if _equal(mean, STATE) else f"{mean}"


def _equal(mean: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return mean.keys() == wanted.keys() and all(
        mean[name].dtype == wanted[name].dtype and torch.equal(mean[name], wanted[name]) for name in wanted
    )


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # what torch says of a damaged pickle before it fails
@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_flipped_bit_never_gives_other_values(kind: str, tmp_path: Path) -> None:
    whole, counts = ARCHIVES[kind], {"right": 0, "refused": 0}
    assert _outcome(tmp_path / "whole.ckpt", whole) == "right"
    for seed in range(1000):
        bit = random.Random(seed).randrange(8 * len(whole))
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        counts[_outcome(tmp_path / "some.ckpt", bytes(content))] += 1
    assert counts["refused"] > 400  # the others are in padding, dates and the like


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_record_that_is_marked_as_a_folder(kind: str, tmp_path: Path) -> None:
    """This bit has no checksum; with it torch returns uninitialized memory for compressed values."""
    whole = ARCHIVES[kind]
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        begin, records = archive.start_dir, archive.infolist()
    for record in records:
        entry = whole.index(record.filename.encode(), begin) - 46
        assert whole[entry : entry + 4] == b"PK\x01\x02"
        content = bytearray(whole)
        content[entry + 38] ^= 0x10  # of the external attributes
        assert _outcome(tmp_path / "some.ckpt", bytes(content)) == "refused"


@pytest.mark.parametrize("kind", [*ARCHIVES, "old", "safetensors"])
def test_a_file_that_is_cut(kind: str, tmp_path: Path) -> None:
    whole = {**ARCHIVES, "old": OLD, "safetensors": save(STATE)}[kind]
    path = tmp_path / f"some.{'safetensors' if kind == 'safetensors' else 'ckpt'}"
    lengths = {*range(0, len(whole), 512 if len(whole) > 1500 else 64), 1, 3, 7, len(whole) - 1}
    assert {length: _outcome(path, whole[:length]) for length in lengths} == dict.fromkeys(lengths, "refused")


def test_the_message_names_file_and_record(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content, path = bytearray(ARCHIVES["lightning"]), tmp_path / "some.ckpt"
    content[content.index(STATE["weight"].numpy().tobytes()) + 40] ^= 4
    path.write_bytes(content)
    sentence = r"some\.ckpt is damaged in its record '.*data/0': copy it again, or take another one"
    with pytest.raises(ValueError, match=sentence):
        average_checkpoints([path])
    with pytest.raises(ValueError, match=sentence):
        greedy_soup([path], lambda state: 1.0)
    for command in (["inspect"], ["inspect", "--unsafe"], ["average", "-o", str(tmp_path / "out.ckpt")]):
        assert cli.main([*command, str(path)]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"lightning-optim: {path} is damaged in its record ")
        assert said.count("\n") == 1
    assert os.listdir(tmp_path) == ["some.ckpt"]


def test_each_file_is_checked(tmp_path: Path) -> None:
    """Also the checksums that are computed while the file before is averaged."""
    damaged = bytearray(PLAIN)
    damaged[damaged.index(STATE["weight"].numpy().tobytes()) + 8] ^= 64
    for place in range(4):
        paths = [tmp_path / f"{index}.ckpt" for index in range(4)]
        for index, path in enumerate(paths):
            path.write_bytes(damaged if index == place else PLAIN)
        with pytest.raises(ValueError, match=rf"{place}\.ckpt is damaged"):
            average_checkpoints(paths)


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "some.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert _equal(average_checkpoints([tmp_path / "some.ckpt"]), STATE)


# ---- headers ---------------------------------------------------------------------------------------------------------


def _tar() -> bytes:
    written = io.BytesIO()
    with tarfile.TarFile(fileobj=written, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    return written.getvalue()


def _safe(header: Any, length: int | None = None, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"P",
    "text": b"epoch: 3\n",
    "random bytes": random.Random(0).randbytes(1000),
    "compressed as a whole": gzip.compress(PLAIN),
    "a plain pickle": pickle.dumps({"w": 1.0}),
    "of torch's first format": _tar(),
    "an archive's first bytes": b"PK\x03\x04" + random.Random(0).randbytes(1000),
    "an archive of something else": _zipped(PLAIN, drop="data.pkl"),
    "an archive without a tensor's bytes": _zipped(PLAIN, drop="data/0"),
    "an archive without a version": _zipped(PLAIN, drop="version"),
    "of a later version": _zipped(PLAIN, put={"version": b"999999999"}),
    "of no order of bytes": _zipped(PLAIN, put={"byteorder": b"middle"}),
    "with fewer bytes than its tensor": _zipped(PLAIN, put={"data/0": bytes(4)}),
    "with more bytes than its tensor": _zipped(PLAIN, put={"data/0": bytes(4000)}),
    "with an empty pickle": _zipped(PLAIN, put={"data.pkl": b""}),
    "with half a pickle": _zipped(PLAIN, put={"data.pkl": b"\x80\x02}X\x01"}),
    "with a list": _zipped(PLAIN, put={"data.pkl": b"\x80\x02]."}),
    "with an overflowing shape": _saved(STATE).replace(b"K\x07K\x05\x86", b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\x05\x86"),
    "old, magic number only": OLD[:20],
    "old, of another version": OLD.replace(b"M\xe9\x03", b"M\xe8\x03", 1),
    "header.safetensors": _safe(b"{{{{{{{{"),
    "length too large.safetensors": _safe(b"{}", length=1 << 63),
    "length negative.safetensors": _safe(b"{}", length=(1 << 64) - 1),
    "length beyond.safetensors": _safe(b"{}", length=100),
    "list.safetensors": _safe([1]),
    "not utf-8.safetensors": _safe(b'{"\xff":{}}'),
    "dtype.safetensors": _safe({"w": {**_ENTRY, "dtype": "F31"}}),
    "overlapping.safetensors": _safe({"v": _ENTRY, "w": _ENTRY}),
    "beyond.safetensors": _safe({"w": {**_ENTRY, "shape": [200], "data_offsets": [0, 800]}}),
    "backwards.safetensors": _safe({"w": {**_ENTRY, "data_offsets": [8, 0]}}),
    "other shape.safetensors": _safe({"w": {**_ENTRY, "shape": [3]}}),
    "overflowing.safetensors": _safe({"w": {**_ENTRY, "shape": [1 << 62, 4]}}),
    "negative shape.safetensors": _safe({"w": {**_ENTRY, "shape": [-2]}}),
    "nan.safetensors": _safe(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "more data.safetensors": _safe({"w": _ENTRY}, data=bytes(16)),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_is_broken(what: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / f"some{Path(what).suffix}"
    assert _outcome(path, HEADERS[what]) == "refused"
    for command in (["inspect"], ["average", "-o", str(tmp_path / "out.ckpt")]):
        assert cli.main([*command, str(path)]) == 1
        said = capsys.readouterr().err
        assert said.startswith("lightning-optim: ") and said.count("\n") == 1 and str(path) in said


def test_no_advice_to_trust_what_is_only_broken(tmp_path: Path) -> None:
    """Reading random bytes with pickle would be worse than an error."""
    path = tmp_path / "some.ckpt"
    for what in ("text", "random bytes", "with half a pickle", "old, magic number only"):
        path.write_bytes(HEADERS[what])
        with pytest.raises(ValueError) as raised:
            average_checkpoints([path])
        assert "weights_only" not in str(raised.value)


# ---- bombs -----------------------------------------------------------------------------------------------------------


def _overlapping() -> bytes:
    """Write an archive of 1 MB whose 64 tensors share one record."""
    written = io.BytesIO()
    saved = _saved({f"w{index}": torch.zeros(1 << 18) for index in range(64)})
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(written, "w") as archive:
        for record in old.infolist():
            name = record.filename.split("/", 1)[1]
            if not name.startswith("data/") or name == "data/0":
                archive.writestr(f"x/{name}", old.read(record))
        first = archive.getinfo("x/data/0")
        for index in range(1, 64):
            other = zipfile.ZipInfo(f"x/data/{index}")
            for name in ("header_offset", "CRC", "compress_size", "file_size", "external_attr"):
                setattr(other, name, getattr(first, name))
            archive.filelist.append(other)
    return written.getvalue()


def _pickle(body: bytes) -> bytes:
    return _zipped(PLAIN, put={"data.pkl": b"\x80\x02" + body + b"."})


def _zeros(method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Write an archive that is 300 times as large without compression, 128 MB."""
    return _zipped(_saved({"w": torch.zeros(32 << 20)}), method)


BOMBS: dict[str, Callable[[], bytes]] = {
    "compressed": _zeros,
    "overlapping": _overlapping,
    "memo": lambda: _pickle(b"}r" + struct.pack("<I", 1 << 28)),
    "bytearray": lambda: _pickle(b"cbuiltins\nbytearray\nJ\x00\x00\x00\x10\x85R"),
    "bytearray of Python 2": lambda: _pickle(b"c__builtin__\nbytearray\nJ\x00\x00\x00\x10\x85R"),
    "tensor of a length": lambda: _pickle(b"}X\x01\x00\x00\x00wctorch\nTensor\nJ\x00\x00\x00\x04\x85Rs"),
    "expanded": lambda: _saved({"w": torch.ones(1).expand(1 << 26)}),
    "the same part again and again": lambda: _saved(_parts(torch.zeros(1 << 18))),
    "old bytearray": lambda: OLD[:500].replace(b"}q", b"cbuiltins\nbytearray\nJ\x00\x00\x00\x10\x85R}q", 1),
}


def _parts(whole: Tensor) -> dict[str, Tensor]:
    return {f"w{index}": whole[index:] for index in range(100)}


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_takes_no_more_than_twice_its_size(what: str, tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    path.write_bytes(BOMBS[what]())

    def refused() -> None:
        with pytest.raises(ValueError, match=r"some\.ckpt"):
            average_checkpoints([path, path])

    refused()  # once, so that all code is loaded
    assert peak_over_start(refused) < 2 * path.stat().st_size / 1e6 + 8


def test_names_without_end(tmp_path: Path) -> None:
    """A dictionary in itself, and nested ones each of which holds the next twice."""
    itself: dict[str, Any] = {"w": torch.ones(1)}
    itself["again"] = itself
    doubled: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(30):
        doubled = {"a": doubled, "b": doubled}
    for content in (itself, doubled, {"state_dict": itself}):
        torch.save(content, tmp_path / "some.ckpt")
        with pytest.raises(ValueError, match=r"some\.ckpt holds names on more than"):
            average_checkpoints([tmp_path / "some.ckpt"])


def test_weights_that_compress_well_are_read(tmp_path: Path) -> None:
    """Values with few digits and many zeros, in an archive of a third of their size."""
    pruned = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    pruned[::2] = 0.0
    path = tmp_path / "some.ckpt"
    path.write_bytes(_zipped(_saved({"w": pruned}), zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 0.4 * pruned.nbytes
    assert torch.equal(average_checkpoints([path])["w"], pruned)
    safe_reading.check(path)
