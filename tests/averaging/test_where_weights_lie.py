"""Weights are found in a checkpoint: under a key, on several levels, or an error says that there are none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_optim import average_checkpoints, average_weights, averaged_state_dict, cli, greedy_soup


def _full(value: float) -> torch.Tensor:
    return torch.full((2,), value)


def _write(folder: Path, make: Any, values: tuple[float, ...] = (1.0, 3.0)) -> list[str]:
    paths = [str(folder / f"{index}.pt") for index in range(len(values))]
    for path, value in zip(paths, values, strict=True):
        torch.save(make(value), path)
    return paths


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(list(arguments))
    said = capsys.readouterr()
    return code, said.out + said.err


OPTIMIZER = {"state": {0: {"exp_avg": _full(5.0), "step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict", "ema"])
def test_under_a_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _write(
        tmp_path, lambda v: {"optimizer": OPTIMIZER, name: {"w": _full(v)}, "epoch": int(v), "args": {"lr": v}}
    )
    assert average_checkpoints(paths)["w"].tolist() == [2.0, 2.0]
    assert average_checkpoints(paths).keys() == {"w"}
    soup = greedy_soup(paths, lambda state: -abs(state["w"][0].item() - 2.2))
    assert soup["w"].tolist() == [2.0, 2.0]
    out = str(tmp_path / "out.pt")
    code, said = _run(capsys, "average", *paths, "-o", out)
    assert (code, said) == (
        0,
        f"{out}: the mean of 2 files; other tensors of the last file are left out: optimizer\n",
    )
    written = torch.load(out)
    # In the order of the last file, with what it says of itself.
    assert list(written) == [name, "epoch", "args", "lightning_optim_average"]
    assert (written[name]["w"].tolist(), written["epoch"], written["args"]) == ([2.0, 2.0], 3, {"lr": 3.0})
    assert _run(capsys, "inspect", out) == (
        0,
        f"{out}: averaged weights under `{name}`, 2 numbers in 1 tensor (1 float32)\n"
        "the mean of 2 files:\n  0.5 * 0.pt\n  0.5 * 1.pt\n",
    )


def test_under_a_name_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _write(tmp_path, lambda v: {"state_dict": {"w": _full(9.0)}, "teacher": {"w": _full(v)}, "step": 5})
    assert average_checkpoints(paths, key="teacher")["w"].tolist() == [2.0, 2.0]
    assert greedy_soup(paths, lambda state: 1.0, key="teacher")["w"].tolist() == [2.0, 2.0]
    out = str(tmp_path / "out.pt")
    code, said = _run(capsys, "average", *paths, "-o", out, "--key", "teacher")
    assert (code, "are left out: state_dict" in said) == (0, True)
    written = torch.load(out)
    assert (written["teacher"]["w"].tolist(), written["step"], len(written)) == ([2.0, 2.0], 5, 3)
    assert "under `teacher`, 2 numbers" in _run(capsys, "inspect", paths[0], "--key", "teacher")[1]
    for command in (["inspect"], ["average", "-o", str(tmp_path / "no.pt")]):
        code, said = _run(capsys, *command, paths[0], "--key", "student")
        assert (code, said.count("\n")) == (1, 1)
        assert f"{paths[0]} has no weights under `student`; there are ['state_dict', 'teacher', 'step']" in said


def test_of_a_lightning_checkpoint_the_state_dict_counts(tmp_path: Path) -> None:
    paths = _write(
        tmp_path,
        lambda v: {"ema": {"w": _full(7.0)}, "state_dict": {"w": _full(v)}, "pytorch-lightning_version": "2.6"},
    )
    assert average_checkpoints(paths)["w"].tolist() == [2.0, 2.0]
    assert average_checkpoints(paths, key="ema")["w"].tolist() == [7.0, 7.0]


def test_several_keys_are_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _write(tmp_path, lambda v: {"model": {"w": _full(v)}, "ema": {"w": _full(10 * v)}})
    with pytest.raises(ValueError, match=r"0\.pt holds weights under \['model', 'ema'\]: choose with `key=`"):
        average_checkpoints(paths)
    code, said = _run(capsys, "inspect", paths[0])
    assert code == 1 and f"{paths[0]} holds weights under ['model', 'ema']" in said
    assert average_checkpoints(paths, key="ema")["w"].tolist() == [20.0, 20.0]


def _levels(value: float) -> dict[str, Any]:
    shared = _full(value)
    return {
        "w": _full(value),
        "m": {
            "v": _full(10 * value),
            "deeper": {"u": _full(100 * value).bfloat16(), "count": torch.tensor(int(value))},
        },
        "tied": {"one": shared, "other": shared},
        "blocks": {0: _full(value), 1: _full(value)},
        "names": {"of": "no tensor", "value": value},
        "layer._extra_state": {"scale": torch.tensor(value)},
        "nothing": {},
    }


@pytest.mark.parametrize("inside", [None, "model"])
def test_on_several_levels(inside: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _write(tmp_path, lambda v: {inside: _levels(v)} if inside else _levels(v))
    out = str(tmp_path / "out.pt")
    assert _run(capsys, "average", *paths, "-o", out)[0] == 0
    written = torch.load(out)
    for mean in (
        average_checkpoints(paths),
        average_weights([_levels(1.0), _levels(3.0)]),
        written.get(inside, written),
    ):
        assert list(mean) == list(_levels(1.0))
        assert mean["w"].tolist() == [2.0, 2.0]
        assert mean["m"]["v"].tolist() == [20.0, 20.0]
        assert (mean["m"]["deeper"]["u"].tolist(), mean["m"]["deeper"]["u"].dtype) == ([200.0, 200.0], torch.bfloat16)
        assert mean["m"]["deeper"]["count"].item() == 3
        assert mean["tied"]["one"].data_ptr() == mean["tied"]["other"].data_ptr()
        assert [block.tolist() for block in mean["blocks"].values()] == [[2.0, 2.0], [2.0, 2.0]]
        assert (mean["names"], mean["nothing"]) == ({"of": "no tensor", "value": 3.0}, {})
        assert mean["layer._extra_state"]["scale"].item() == 3.0  # a module's own affair: the last one's


def test_levels_have_names_with_dots_in_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _write(tmp_path, lambda v: {"model": {"w": _full(v), "m": {"v": _full(v)}}})
    out = str(tmp_path / "out.safetensors")
    assert _run(capsys, "average", *paths, "-o", out)[0] == 0
    assert {name: value.tolist() for name, value in load_file(out).items()} == {"w": [2.0, 2.0], "m.v": [2.0, 2.0]}
    paths = _write(tmp_path, lambda v: {"m.v": _full(v), "m": {"v": _full(v)}})
    code, said = _run(capsys, "average", *paths, "-o", out, "--force")
    assert (code, out in said, "('m', 'v')" in said) == (1, True, True)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        {"state_dict": [1, 2]},
        {"state_dict": {}, "callbacks": {"EMA": {"averaged": {"w": torch.ones(2)}}}},
        {"state_dict": {"count": torch.tensor(3)}},
        {"state_dict": {"w": [torch.ones(2)]}},
        {"epoch": 3},
        {"model": {}, "epoch": 3},
        {},
    ],
    ids=lambda content: "-".join(content) or "nothing",
)
def test_nothing_to_average(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _write(tmp_path, lambda v: content)
    for paths_given in (paths, paths[:1]):
        with pytest.raises(ValueError, match=r"0\.pt .*nothing to average"):
            average_checkpoints(paths_given)
        with pytest.raises(ValueError, match=r"0\.pt .*nothing to average"):
            greedy_soup(paths_given, lambda state: 1.0)
        code, said = _run(capsys, "average", *paths_given, "-o", str(tmp_path / "out.pt"))
        assert (code, said.count("\n"), paths[0] in said) == (1, 1, True)
    assert sorted(os.listdir(tmp_path)) == ["0.pt", "1.pt"]


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"w": _full(1.0), "m": {"u": _full(1.0)}}, r"different names: \['m\.u', 'm\.v'\]"),
        ({"w": _full(1.0), "m": {"v": torch.ones(3)}}, r"different shapes of m\.v"),
        ({"w": _full(1.0), "m": {"v": _full(1.0).long()}}, r"m\.v as numbers of two kinds: .*no floating-point"),
        ({"w": _full(1.0), "m": {"v": _full(1.0).to(torch.complex64)}}, r"m\.v as numbers of two kinds: .*complex"),
        ({"w": _full(1.0), "m": {"v": _full(1.0).to_sparse()}}, r"m\.v is a sparse tensor, which has no mean"),
    ],
)
def test_files_that_do_not_fit(other: Any, sentence: str, tmp_path: Path) -> None:
    paths = _write(tmp_path, lambda v: other if v == 3.0 else {"w": _full(v), "m": {"v": _full(v)}})
    for order in (paths, paths[::-1]):
        with pytest.raises(ValueError, match=sentence):
            average_checkpoints(order)


def test_meta_tensors_have_no_values(tmp_path: Path) -> None:
    paths = _write(tmp_path, lambda v: {"w": _full(v), "m": torch.empty(3, device="meta")})
    with pytest.raises(ValueError, match=r"0\.pt: m is a meta tensor"):
        average_checkpoints(paths)


def test_an_average_of_a_file_without_a_state_dict(tmp_path: Path) -> None:
    counters = [{"updates": 1, "first": 1, "last": 1}]
    state = {"counters": counters, "raw": {}, "averaged": {"w": _full(1.0)}}
    for content in (
        {"callbacks": {"WeightAveraging": state}},
        {"callbacks": [], "state_dict": {}},
        {"state_dict": [1]},
    ):
        (path,) = _write(tmp_path, lambda v, content=content: content, (1.0,))
        with pytest.raises(ValueError, match=r"0\.pt does not hold exactly one average"):
            averaged_state_dict(path)
