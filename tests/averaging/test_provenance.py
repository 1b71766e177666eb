"""What `average`, `soup` and `Soup.save` write: the weights, of which files they are the mean, and what loads it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_optim import average_checkpoints, cli, greedy_soup
from lightning_optim.averaging.checkpoints.provenance import KEY, short_names
from tests.averaging.models import Model, assert_equal, fit, snapshot
from tests.lightning import ModelCheckpoint


class Given(Model):
    """Model with hyper-parameters, which `load_from_checkpoint` needs."""

    def __init__(self, rate: float) -> None:
        super().__init__(lr=rate)
        self.save_hyperparameters()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    fit(Given(0.05), [ModelCheckpoint(".", filename="{epoch}", save_top_k=-1)], enable_checkpointing=True)
    return [f"epoch={epoch}.ckpt" for epoch in range(2)]


@pytest.fixture
def numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files of one number each: 4, 1, 2, 2.8."""
    monkeypatch.chdir(tmp_path)
    for name, value in zip("abcd", (4.0, 1.0, 2.0, 2.8), strict=True):
        torch.save({"w": torch.tensor([value]), "count": torch.tensor(3)}, f"{name}.pt")
    Path("score_of_numbers.py").write_text(
        "def distance(state): return abs(state['w'].item() - 2.3)\n"
        "def fails(state):\n    return state['none']\n"
        "def text(state): return 'good'\n"
        "value = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "score_of_numbers", raising=False)
    return [f"{name}.pt" for name in "abcd"]


def inspected(path: str, capsys: pytest.CaptureFixture) -> list[str]:
    capsys.readouterr()
    assert cli.main(["inspect", path]) == 0
    return capsys.readouterr().out.splitlines()


def distance(state: Any) -> float:
    return abs(state["w"].item() - 2.3)


# ---- of which files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["ckpt", "pt", "pth", "safetensors"])
def test_inspect_knows_what_average_wrote(files: list[str], ending: str, capsys) -> None:
    out = f"out.{ending}"
    assert cli.main(["average", *files, "-o", out, "--weights", "1,3"]) == 0
    lines = inspected(out, capsys)
    assert lines[-3:] == ["the mean of 2 files:", "  0.25 * epoch=0.ckpt", "  0.75 * epoch=1.ckpt"]
    assert "averaged weights, 41 numbers in 4 tensors" in lines[-4]
    if ending != "safetensors":
        assert lines[1] == "epoch 1, global step 16, those of epoch=1.ckpt"


def test_the_entry_is_plain_values(files: list[str]) -> None:
    assert cli.main(["average", *files, "-o", "out.ckpt"]) == 0
    entry = torch.load("out.ckpt", weights_only=True)[KEY]
    sources = [{"file": file, "weight": 0.5, "average": None} for file in files]
    assert entry == {"version": 1, "files": sources, "score": None}
    assert_equal(snapshot(Given.load_from_checkpoint("out.ckpt", weights_only=True)), average_checkpoints(files))


def test_a_state_dict_gets_no_name_that_a_module_does_not_know(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(nn.Linear(2, 2).state_dict(), name)
    assert cli.main(["average", "a.pt", "b.pt", "-o", "out.pt"]) == 0
    loaded = torch.load("out.pt", weights_only=True)
    assert set(loaded) == {"weight", "bias"}
    nn.Linear(2, 2).load_state_dict(loaded)
    assert inspected("out.pt", capsys)[1:] == ["the mean of 2 files:", "  0.5 * a.pt", "  0.5 * b.pt"]


@pytest.mark.parametrize("ending", ["ckpt", "pt", "safetensors"])
def test_an_average_of_averages_says_so(files: list[str], ending: str, capsys) -> None:
    first = f"first.{ending}"
    assert cli.main(["average", *files, "-o", first]) == 0
    assert cli.main(["average", first, files[0], "-o", "second.ckpt", "--weights", "2,1"]) == 0
    said = inspected("second.ckpt", capsys)
    assert said[said.index("the mean of 2 files:") + 1 :] == [
        f"  0.6667 * {first}, which is the mean of 2 files:",
        "    0.5 * epoch=0.ckpt",
        "    0.5 * epoch=1.ckpt",
        "  0.3333 * epoch=0.ckpt",
    ]


def test_a_long_chain_of_averages_does_not_grow(numbers: list[str], capsys) -> None:
    sizes = []
    for index in range(8):
        out = f"{index}.ckpt"
        assert cli.main(["average", numbers[0], f"{index - 1}.ckpt" if index else numbers[1], "-o", out]) == 0
        sizes.append(Path(out).stat().st_size)
    assert sizes[-1] == sizes[-2]
    assert len(inspected("7.ckpt", capsys)) == 1 + 1 + 4 * 2


def test_names_by_which_files_can_be_told_apart() -> None:
    assert short_names(["/runs/1/last.ckpt", "/runs/2/last.ckpt", "/runs/1/last.ckpt"]) == [
        "1/last.ckpt",
        "2/last.ckpt",
        "1/last.ckpt",
    ]
    assert short_names(["/only/one.ckpt"]) == ["one.ckpt"] and short_names([]) == []


@pytest.mark.parametrize(
    "entry",
    [
        *[None, 3, {}, {"files": []}, {"files": 3, "score": None}, {"files": [{}], "score": None}],
        {"files": [{"file": "a", "weight": "much"}], "score": None},
        {"files": [{"file": "a", "weight": float("nan")}], "score": None},
        {"files": torch.ones(3), "score": None},
        {"files": [{"file": "a", "weight": 1.0}], "score": 1.0, "tried": 1 << 40},
    ],
    ids=str,
)
def test_an_entry_that_another_wrote_is_ignored(entry: Any, tmp_path: Path, capsys) -> None:
    content = {"state_dict": {"w": torch.ones(1)}, "pytorch-lightning_version": "2.6.6", KEY: entry}
    torch.save(content, tmp_path / "odd.ckpt")
    assert "unknown whether raw or averaged" in inspected(str(tmp_path / "odd.ckpt"), capsys)[-1]


def test_an_entry_without_an_end_is_cut(tmp_path: Path, capsys) -> None:
    inner: Any = None
    for _ in range(6):
        inner = {"files": [{"file": "a\nb" * 1000, "weight": 0.5, "average": inner}] * 50, "score": None}
    torch.save({"state_dict": {"w": torch.ones(1)}, KEY: inner}, tmp_path / "odd.ckpt")
    lines = inspected(str(tmp_path / "odd.ckpt"), capsys)
    assert len(lines) == 101 and all(line.isprintable() for line in lines)


# ---- soups -----------------------------------------------------------------------------------------------------------


def test_the_command_prints_each_step(numbers: list[str], capsys) -> None:
    arguments = ["soup", *numbers, "--score", "score_of_numbers:distance", "--mode", "min", "--no-barrier"]
    assert cli.main([*arguments, "-o", "soup.pt"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a.pt alone: 1.7",
        "b.pt alone: 1.3",
        "c.pt alone: 0.3",
        "d.pt alone: 0.5",
        "soup of c.pt: 0.3",
        "soup + d.pt: 0.1, kept",
        "soup + b.pt: 0.366667, left out",
        "soup + a.pt: 0.633333, left out",
        "soup.pt: a greedy soup of 2 of 4 files, score 0.1",
    ]
    torch.testing.assert_close(torch.load("soup.pt")["w"], torch.tensor([2.4]))
    assert inspected("soup.pt", capsys)[1:] == [
        "a greedy soup of 2 of 4 files, score 0.1:",
        "  0.5 * c.pt",
        "  0.5 * d.pt",
    ]


def test_files_of_a_soup_are_told_apart_from_all_that_were_tried(numbers: list[str], capsys) -> None:
    for run, name in (("run_a", "c.pt"), ("run_b", "b.pt")):
        Path(run).mkdir()
        Path(name).rename(f"{run}/last.pt")
    arguments = ["--score", "score_of_numbers:distance", "--mode", "min", "--no-barrier", "-o", "soup.pt"]
    assert cli.main(["soup", "run_a/last.pt", "run_b/last.pt", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "soup.pt: a greedy soup of 1 of 2 files, score 0.3: the weights of run_a/last.pt alone"
    )
    assert inspected("soup.pt", capsys) == [
        "soup.pt: the weights of one file, 2 numbers in 2 tensors (1 float32, 1 int64)",
        "a greedy soup of 1 of 2 files, score 0.3:",
        "  1 * run_a/last.pt",
    ]


def test_one_file_is_no_average(files: list[str], numbers: list[str], capsys) -> None:
    assert cli.main(["average", files[0], "-o", "one.ckpt"]) == 0
    assert capsys.readouterr().out == "one.ckpt: the weights of one file, which is no average\n"
    assert inspected("one.ckpt", capsys)[2:] == [
        "state_dict: the weights of one file, 41 numbers in 4 tensors (4 float32)",
        "a copy of 1 file:",
        "  1 * epoch=0.ckpt",
    ]
    assert cli.main(["average", *files, "--weights", "1,0", "-o", "first.ckpt"]) == 0
    assert "the weights of one file, 41" in inspected("first.ckpt", capsys)[2]
    assert cli.main(["average", *files, "-o", "mean.ckpt"]) == 0
    assert cli.main(["average", "mean.ckpt", "-o", "copy.ckpt"]) == 0
    assert "averaged weights" in inspected("copy.ckpt", capsys)[2]


def test_a_soup_saves_itself(numbers: list[str], capsys) -> None:
    soup = greedy_soup(numbers, distance, mode="min", barrier=None)
    assert [(one.path, one.kept) for one in soup.tried] == [
        ("c.pt", True),
        ("d.pt", True),
        ("b.pt", False),
        ("a.pt", False),
    ]
    assert [one.score for one in soup.tried[:2]] == pytest.approx([0.3, 0.1])
    for name in ("soup.pt", "soup.safetensors", Path("soup.pth")):
        soup.save(name)
        assert inspected(str(name), capsys)[-2:] == ["  0.5 * c.pt", "  0.5 * d.pt"]
    torch.testing.assert_close(load_file("soup.safetensors")["w"], torch.tensor([2.4]))
    with pytest.raises(ValueError, match=r"soup\.bin must end in \.ckpt"):
        soup.save("soup.bin")
    assert cli.main(["average", "soup.pt", "a.pt", "-o", "both.pt"]) == 0
    assert "  0.5 * soup.pt, which is a greedy soup of 2 of 4 files, score 0.1:" in inspected("both.pt", capsys)


def test_a_saved_soup_of_lightning_checkpoints_loads(files: list[str]) -> None:
    soup = greedy_soup(files, lambda state: 1.0)
    soup.save("soup.ckpt")
    model = Given.load_from_checkpoint("soup.ckpt", weights_only=True)
    assert model.lr == 0.05
    assert_equal(snapshot(model), average_checkpoints(files))
    assert not {"optimizer_states", "callbacks", "loops"} & torch.load("soup.ckpt", weights_only=True).keys()


def test_a_soup_with_another_key(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("a.ckpt", 1.0), ("b.ckpt", 3.0)):
        torch.save({"teacher": {"w": torch.tensor([value])}, "state_dict": {"w": torch.zeros(1)}}, name)
    greedy_soup(["a.ckpt", "b.ckpt"], lambda state: 1.0, key="teacher").save("soup.ckpt")
    assert torch.load("soup.ckpt", weights_only=True)["teacher"]["w"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        ("score_of_numbers", "--score must be a module and a function in it, such as my_score:accuracy, got"),
        ("score_of_numbers.py:distance", "--score must be a module and a function in it"),
        ("score_of_number:distance", "No module named 'score_of_number'; did you mean 'score_of_numbers'?"),
        ("score_of_numbers:distanc", "score_of_numbers has no function distanc; did you mean 'distance'?"),
        ("score_of_numbers:value", "score_of_numbers has no function value"),
        ("score_of_numbers:fails", "score_of_numbers:fails raised KeyError: 'none' (score_of_numbers.py, line 3)"),
        ("score_of_numbers:text", "score_of_numbers:text returned 'good': it must return a number"),
    ],
)
def test_errors_of_a_score_are_a_line(numbers: list[str], score: str, sentence: str, capsys) -> None:
    assert cli.main(["soup", *numbers, "--score", score, "-o", "soup.pt"]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("lightning-optim: --score") and said.count("\n") == 1
    assert not Path("soup.pt").exists()


def test_the_barrier_is_told_in_the_command_too(numbers: list[str], capsys) -> None:
    arguments = ["soup", "a.pt", "b.pt", "--score", "score_of_numbers:distance", "-o", "soup.pt"]
    assert cli.main(arguments) == 1
    assert "`--no-barrier` to a command" in capsys.readouterr().err
    assert cli.main([*arguments, "--no-barrier"]) == 0


@pytest.mark.parametrize("writes", [False, True])
def test_batchnorm_in_a_soup_is_told_of_unless_the_score_wrote_its_statistics(writes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(nn.BatchNorm1d(2).state_dict(), name)

    def score(state: Any) -> float:
        if writes:
            state["running_var"].copy_(torch.full((2,), 5.0))
        return 1.0

    monkeypatch.setattr(cli, "_imported", lambda name: score)
    assert cli.main(["soup", "a.pt", "b.pt", "--score", "a:b", "-o", "soup.pt"]) == 0
    assert ("refresh_batchnorm_" in capsys.readouterr().err) != writes
    assert torch.load("soup.pt")["running_var"].tolist() == ([5.0, 5.0] if writes else [1.0, 1.0])
