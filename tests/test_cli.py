"""Test the command line as a user calls it."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_optim
from lightning_optim import EMA, LAWA, Ensemble, WeightAveraging, average_checkpoints, cli, fit_members, version
from tests.averaging.models import Model, assert_equal, data, fit, snapshot
from tests.ensembling.models import QUIET
from tests.lightning import EMAWeightAveraging as TheirEMA
from tests.lightning import ModelCheckpoint, Trainer


class Given(Model):
    """Model with hyper-parameters, which `load_from_checkpoint` needs."""

    def __init__(self, rate: float) -> None:
        super().__init__(lr=rate)
        self.save_hyperparameters()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    callbacks = [
        ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1),
        WeightAveraging(EMA(0.9)),
        WeightAveraging(LAWA(2), start=4, evaluate=False, name="late"),
    ]
    fit(Given(0.05), callbacks, enable_checkpointing=True)
    return [str(tmp_path / f"epoch={epoch}.ckpt") for epoch in range(2)]


def test_average_writes_a_checkpoint_that_loads(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = str(tmp_path / "out.ckpt")
    assert cli.main(["average", *files, "-o", out, "--weights", "1,3"]) == 0
    assert capsys.readouterr().out == f"{out}: the mean of 2 files\n"
    model = Given.load_from_checkpoint(out, weights_only=True)
    assert model.lr == 0.05
    assert_equal(snapshot(model), average_checkpoints(files, [1, 3]))
    assert not {"optimizer_states", "callbacks", "loops"} & torch.load(out, weights_only=True).keys()
    assert not Path(f"{out}.new").exists()


def test_average_does_not_overwrite_unless_told(files: list[str], capsys: pytest.CaptureFixture) -> None:
    mean = average_checkpoints(files)
    assert cli.main(["average", *files, "-o", files[0]]) == 1
    assert capsys.readouterr().err == f"lightning-optim: {files[0]} exists: choose another name, or pass --force\n"
    assert cli.main(["average", *files, "-o", files[0], "--force"]) == 0
    assert_equal(torch.load(files[0], weights_only=True)["state_dict"], mean)


def test_average_of_other_kinds_of_files(files: list[str], tmp_path: Path) -> None:
    states = [torch.load(path, weights_only=True)["state_dict"] for path in files]
    save_file(dict(states[0]), tmp_path / "a.safetensors")
    torch.save(states[1], tmp_path / "b.pt")
    given = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.pt")]
    for out in ("out.safetensors", "out.pt"):
        assert cli.main(["average", *given, "-o", str(tmp_path / out)]) == 0
    assert_equal(load_file(tmp_path / "out.safetensors"), average_checkpoints(files))
    assert_equal(torch.load(tmp_path / "out.pt"), average_checkpoints(files))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.ckpt"], "No such file or directory"),
        (["--weights", "1"], "--weights has 1 number for 2 files"),
        (["--weights", "1,2,3"], "--weights has 3 numbers for 2 files"),
        (["--weights", "1", "2"], "give one for each file; with commas 1,2 would be weights"),
        (["--weights", "a.ckpt"], "--weights takes numbers with commas, such as --weights 0.25,0.75, and 'a.ckpt'"),
        (["--weights", "0,0"], "`weights` must be 2 numbers >= 0, not all zero"),
        (["epoch0.ckpt"], "epoch0.ckpt: No such file or directory; did you mean 'epoch=0.ckpt'?"),
        (["run/epoch0.ckpt"], "run/epoch0.ckpt: No such file or directory; did you mean 'run/epoch=5.ckpt'?"),
        (["runn/epoch=5.ckpt"], "directory; there is no folder 'runn'; did you mean 'run/epoch=5.ckpt'?"),
        (["runn/other.ckpt"], "directory; there is no folder 'runn'; did you mean 'run'?"),
        (["elsewhere/epoch=5.ckpt"], "directory; there is no folder 'elsewhere'"),
        (["run/other*.ckpt"], "No such file or directory; no file matches this pattern"),
        (["run"], "run is a folder, and no distributed checkpoint: pass the 1 checkpoint in it, run/*.ckpt"),
        (["."], ". is a folder, and no distributed checkpoint: pass the 3 checkpoints in it, ./*.ckpt"),
        (["version_0"], "pass the 1 checkpoint in it, version_0/checkpoints/*.ckpt"),
        (["cut.ckpt"], "cut.ckpt is damaged or incomplete, or no checkpoint: copy it again, or take another one\n"),
        (["strange.ckpt"], "pass `weights_only=False` if you trust it"),
    ],
)
def test_errors_are_a_sentence(
    files: list[str], tmp_path: Path, arguments, sentence: str, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "path": Path("x")}, "strange.ckpt")
    for folder in ("run", "version_0/checkpoints", "cut"):
        Path(folder).mkdir(parents=True)
        Path(folder, "epoch=5.ckpt").write_bytes(Path(files[0]).read_bytes())
    if arguments == ["cut.ckpt"]:
        Path("cut.ckpt").write_bytes(Path(files[0]).read_bytes()[:2000])
    assert cli.main(["average", "-o", "out.ckpt", *files, *arguments]) == 1
    assert sentence in capsys.readouterr().err
    assert not Path("out.ckpt").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["A", "B", "--weights", "1,3"],
        ["--weights", "1,3", "A", "B"],
        ["--weights", "1", "A", "--weights", "3", "B"],
        ["A", "--weights=1", "B", "--weights=3"],
    ],
    ids=" ".join,
)
def test_weights_and_files_in_any_order(files: list[str], arguments: list[str], tmp_path: Path) -> None:
    given = [{"A": files[0], "B": files[1]}.get(argument, argument) for argument in arguments]
    out = str(tmp_path / "out.ckpt")
    for place in (0, len(given)):
        assert cli.main(["average", *given[:place], "-o", out, *given[place:], "--force"]) == 0
        assert_equal(torch.load(out, weights_only=True)["state_dict"], average_checkpoints(files, [1, 3]))


@pytest.mark.parametrize("name", ["out", "out.bin", "out.ckpt.bak", "out.npz"])
def test_an_output_of_another_ending_is_refused_before_anything_is_read(name: str, tmp_path: Path, capsys) -> None:
    for command in (["average"], ["soup", "--score", "none:none"]):
        assert cli.main([*command, "missing.ckpt", "-o", name]) == 1
        assert capsys.readouterr().err == (
            f"lightning-optim: {name} must end in .ckpt, .pt, .pth or .safetensors, which chooses the format\n"
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "lightning-optim: the following arguments are required: command; see `lightning-optim --help`"),
        (["average", "a.ckpt"], "lightning-optim average: the following arguments are required: -o/--output; see"),
        (["avrage"], "lightning-optim: argument command: invalid choice: 'avrage'"),
        (["inspect", "--wieghts"], "lightning-optim inspect: the following arguments are required: file"),
    ],
)
def test_wrong_arguments_are_answered_in_a_line(arguments: list[str], sentence: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    said = capsys.readouterr().err
    assert said.startswith(sentence) and said.count("\n") == 1


def test_the_version(capsys: pytest.CaptureFixture) -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{version.VERSION}"\n' in project
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"lightning-optim {lightning_optim.__version__}\n"
    assert "__version__" not in lightning_optim.__all__


def test_the_version_of_a_source_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version.metadata, "version", lambda name: "7.1")
    assert version.installed_version() == "7.1"

    def missing(name: str) -> str:
        raise version.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version.metadata, "version", missing)
    assert version.installed_version() == version.VERSION


def test_an_interrupt_is_no_traceback(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "mean_of_checkpoints", interrupted)
    assert cli.main(["average", "a.ckpt", "-o", str(tmp_path / "out.ckpt")]) == 130
    assert capsys.readouterr().err == "lightning-optim: interrupted; no file was written\n"


def test_batchnorm_is_told_of(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)).state_dict(), name)
    assert cli.main(["average", "a.pt", "b.pt", "-o", "out.safetensors"]) == 0
    first, line = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "lightning-optim: warning: out.safetensors has the running statistics of 2 BatchNorm layers"
    )
    assert line == "  lightning_optim.refresh_batchnorm_(model, train_loader)"
    assert cli.main(["average", "a.pt", "-o", "one.pt"]) == 0
    assert capsys.readouterr().err == "", "the statistics of one model are its own"


@pytest.mark.parametrize("command", [["average", "-o", "out.ckpt"], ["inspect"]], ids=lambda command: command[0])
@pytest.mark.parametrize("unsafe", [[], ["--unsafe"]], ids=str)
@pytest.mark.parametrize("what", ["text", "empty", "cut", "list", "tensor"])
def test_a_file_that_is_no_checkpoint_is_named(
    what: str, unsafe: list[str], command: list[str], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(999)}, "whole.ckpt")
    torch.save([torch.ones(2)] if what == "list" else torch.ones(2), "some.ckpt")
    content = {"text": b"epoch: 3\n", "empty": b"", "cut": Path("whole.ckpt").read_bytes()[:2000]}
    if what in content:
        Path("some.ckpt").write_bytes(content[what])
    assert cli.main([*command, "some.ckpt", *unsafe]) == 1
    assert "some.ckpt" in capsys.readouterr().err
    assert not Path("out.ckpt").exists()


def test_inspect_says_what_is_in_a_file(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["inspect", files[0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{files[0]}: a checkpoint of Lightning 2.")
    assert lines[1:] == [
        "epoch 0, global step 8",
        "state_dict: averaged weights, 41 numbers in 4 tensors (4 float32)",
        "EMA(0.9): 8 updates, the first at step 1, the last at 8; in state_dict, raw weights beside",
        "LAWA(2) name='late': 4 updates, the first at step 5, the last at 8; in the callback's state",
    ]


@pytest.mark.filterwarnings("ignore:WeightAveraging.* has no effect")  # it is not started in this run
@pytest.mark.parametrize(
    ("callbacks", "weights_only", "lines"),
    [
        ([], False, ["state_dict: raw weights"]),
        ([WeightAveraging(EMA(0.9), start=100)], False, ["state_dict: raw weights"]),
        ([WeightAveraging(EMA(0.9))], True, ["state_dict: unknown whether raw or averaged weights"]),
        (
            TheirEMA,
            False,
            ["state_dict: averaged weights", "an average of Lightning's WeightAveraging: 8 updates; raw"],
        ),
    ],
    ids=["raw", "not started", "weights only", "Lightning's"],
)
def test_inspect_of_other_files(callbacks, weights_only: bool, lines, tmp_path: Path, capsys) -> None:
    files = ModelCheckpoint(tmp_path, filename="one", save_weights_only=weights_only)
    ours = callbacks if isinstance(callbacks, list) else [callbacks()]
    fit(Model(), [*ours, files], enable_checkpointing=True, max_epochs=1)
    assert cli.main(["inspect", str(tmp_path / "one.ckpt")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert ("with weights only" in printed[0]) == weights_only
    assert len(printed) == 2 + len(lines)
    for found, line in zip(printed[2:], lines, strict=True):
        assert found.startswith(line)


def test_inspect_of_averages_without_their_numbers(files: list[str], capsys: pytest.CaptureFixture) -> None:
    """As earlier versions wrote them."""
    checkpoint = torch.load(files[0], weights_only=True)
    assert [state.pop("policy", None) for state in checkpoint["callbacks"].values()].count("EMA(0.9)") == 1
    torch.save(checkpoint, files[0])
    assert cli.main(["inspect", files[0]]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[3:]] == ["EMA", "LAWA name='late'"]


@pytest.fixture
def members(tmp_path: Path) -> list[str]:
    def trainer(index: int) -> Trainer:
        averages = [WeightAveraging(EMA(0.9))] if index else []
        return Trainer(max_epochs=1, callbacks=averages, **QUIET)

    return fit_members(lambda index: Model(), 2, trainer, data(), dirpath=tmp_path / "members", seed=3)


def test_inspect_knows_members_and_ensembles(members: list[str], tmp_path: Path, capsys) -> None:
    weights = "41 numbers in 4 tensors (4 float32)"
    for path, kind in zip(
        members, ("weights at the end of its fit", "weights of WeightAveraging(EMA(decay=0.9))"), strict=True
    ):
        assert cli.main(["inspect", path]) == 0
        assert capsys.readouterr().out.splitlines()[2:] == [
            f"member {members.index(path)} of `fit_members`, seed 3",
            f"state_dict: {kind}, {weights}",
        ]
    ensemble, out = Ensemble.from_checkpoints(Model, members, outputs="values"), str(tmp_path / "ensemble.ckpt")
    trainer = Trainer(**QUIET)
    trainer.predict(ensemble, data())
    trainer.save_checkpoint(out)
    assert cli.main(["inspect", out]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "an Ensemble of 2 Model, outputs=values",
        "state_dict: weights of the members, 82 numbers in 8 tensors (8 float32)",
    ]
    assert cli.main(["average", *members, "-o", str(tmp_path / "mean.ckpt")]) == 0
    assert capsys.readouterr().err.startswith(
        "lightning-optim: warning: all files are members that fit_members trained, each with a seed of its own."
    )
    assert cli.main(["average", members[0], "-o", str(tmp_path / "one.ckpt")]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "entry", [3, {}, {"seed": "a", "index": 1}, {"seed": 1, "index": -1}, {"members": [{}]}], ids=str
)
def test_entries_that_another_wrote_are_ignored(entry: Any, tmp_path: Path, capsys) -> None:
    torch.save(_lightning(fit_members=entry, ensemble=entry), tmp_path / "odd.ckpt")
    assert cli.main(["inspect", str(tmp_path / "odd.ckpt")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_it_is_said_that_raw_weights_were_taken(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    callbacks = [
        ModelCheckpoint(".", filename="{epoch}", save_top_k=-1),
        WeightAveraging(EMA(0.9), evaluate=False, apply_at_end=False, name="slow"),
    ]
    fit(Model(), callbacks, enable_checkpointing=True)
    assert cli.main(["average", "epoch=0.ckpt", "epoch=1.ckpt", "-o", "out.ckpt"]) == 0
    assert capsys.readouterr().err == (
        "lightning-optim: note: the raw weights of all files were taken, and not the average beside them, EMA(0.9),"
        " which has evaluate=False: averaged_state_dict(path, 'slow') returns it\n"
    )
    assert cli.main(["average", "epoch=0.ckpt", "out.ckpt", "./epoch=0.ckpt", "-o", "again.ckpt"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "lightning-optim: note: epoch=0.ckpt is given 2 times, and counts as often"
    assert said[1].startswith("lightning-optim: note: the raw weights of epoch=0.ckpt, ./epoch=0.ckpt were taken")


def test_inspect_of_plain_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(3, dtype=torch.int64)}, tmp_path / "a.pt")
    save_file({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    assert cli.main(["inspect", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/a.pt: weights, 5 numbers in 2 tensors (1 float32, 1 int64)",
        f"{tmp_path}/a.safetensors: weights, 2 numbers in 1 tensor (1 bfloat16)",
    ]


def test_the_entry_point_and_its_help(capsys: pytest.CaptureFixture) -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.scripts]\nlightning-optim = "lightning_optim.cli:main"\n' in project
    with pytest.raises(SystemExit, match="0"):
        cli.main(["average", "--help"])
    assert capsys.readouterr().out.startswith("usage: lightning-optim average")


@pytest.mark.parametrize("module", ["lightning_optim", "lightning_optim.cli"])
def test_the_command_as_a_module(module: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["module", "--version"])
    monkeypatch.delitem(sys.modules, module if module.endswith("cli") else f"{module}.__main__", raising=False)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().out == f"lightning-optim {lightning_optim.__version__}\n"
    monkeypatch.setattr("sys.argv", ["module", "inspect", "missing.ckpt"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_module(module, run_name="__main__")


# ---- contents that nobody would write ----

UPDATES = {"counters": [{"updates": 1, "first": 1, "last": 2}], "raw": {}, "averaged": {}}


def _lightning(**more: Any) -> dict[str, Any]:
    return {"state_dict": {"w": torch.ones(3)}, "pytorch-lightning_version": "2.6.6", **more}


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (_lightning(callbacks=["x"]), 3),
        (_lightning(callbacks={"a": {"counters": 3}, "b": {"counters": [1]}, "c": {"counters": [{"updates": 1}]}}), 3),
        (_lightning(callbacks={7: {**UPDATES, "raw": None}}), 4),
        (_lightning(callbacks={"W{" + "-" * 200_000 + "1}": UPDATES}), 4),
        (_lightning(callbacks={"W{" + "(" * 3000 + "}": UPDATES}), 4),
        (_lightning(callbacks={"W{1, 2}": UPDATES}), 4),
        (_lightning(callbacks={"W{'average': 'a\nb\x1b[31m'}": UPDATES}), 4),
        (_lightning(callbacks={"a": {**UPDATES, "averaged": 5}}), 3),
        (_lightning(averaging_state=3, epoch=torch.ones(40, 40), callbacks={}), 3),
        (_lightning(callbacks={"a": {**UPDATES, "counters": torch.ones(2)}}), 3),
        (_lightning(callbacks={"a": {**UPDATES, "raw": torch.ones(3)}}), 3),
        (_lightning(callbacks={"a": {**UPDATES, "counters": [{"updates": float("inf"), "first": 1, "last": 1}]}}), 3),
        (_lightning(callbacks={"a": {**UPDATES, "averaged": {"w": 3}}}), 3),
    ],
    ids=[
        *["list", "counters", "number", "long", "deep", "set", "control characters", "averaged", "averaging state"],
        *["counters of another kind", "raw", "infinite", "averaged numbers"],
    ],
)
def test_inspect_of_odd_contents(content: Any, lines: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(content, tmp_path / "odd.ckpt")
    assert cli.main(["inspect", str(tmp_path / "odd.ckpt")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path}/odd.ckpt: a checkpoint of Lightning 2.6.6\n")
    assert printed.count("\n") == lines
    assert printed.replace("\n", "").isprintable()


@pytest.mark.parametrize("updates", ["many", None, torch.ones(2)], ids=["text", "none", "several"])
def test_the_message_names_the_damaged_file(updates: Any, tmp_path: Path, capsys) -> None:
    torch.save(_lightning(averaging_state={"n_averaged": updates}), tmp_path / "odd.ckpt")
    assert cli.main(["inspect", str(tmp_path / "odd.ckpt")]) == 1
    assert capsys.readouterr().err.startswith(f"lightning-optim: {tmp_path}/odd.ckpt: ")


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "unknown-protocol://file.ckpt"])
def test_a_path_that_is_no_file_is_named(path: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    for command in (["inspect", path], ["average", path, "-o", "out.ckpt"]):
        assert cli.main(command) == 1
        assert path in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "out", "named"),
    [
        (
            {"w": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])},
            "out.ckpt",
            r"in\.ckpt(: w is a nested tensor| holds more .*nested_tensor)",  # torch 2.15 does not read it
        ),
        ({"w": torch.ones(3).to_sparse()}, "out.ckpt", "in.ckpt"),
        ({"w": torch.ones(3, dtype=torch.complex128)}, "out.safetensors", "out.safetensors"),
        (_lightning(state_dict={1: torch.ones(3)}), "out.safetensors", "out.safetensors"),
        (_lightning(state_dict={"w": torch.ones(1).expand(1 << 40)}), "out.ckpt", "in.ckpt"),
        ({"w": torch.ones(3)}, "none/out.ckpt", "none/out.ckpt"),
        ([torch.ones(3)], "out.ckpt", "in.ckpt"),
        ({"w\n\x1b[31m": torch.ones(3).to_sparse()}, "out.ckpt", "in.ckpt"),
    ],
    ids=["nested", "sparse", "complex128", "names", "stride 0", "folder", "list", "control characters"],
)
def test_averages_of_odd_contents(
    content: Any, out: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(content, tmp_path / "in.ckpt")
    assert cli.main(["average", str(tmp_path / "in.ckpt"), "-o", str(tmp_path / out)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("lightning-optim: ") and re.search(f"{re.escape(str(tmp_path))}/{named}", said)
    assert said[:-1].isprintable() and said.endswith("\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.ckpt"]


def test_an_expanded_tensor_and_names_that_are_numbers_are_averaged(tmp_path: Path) -> None:
    torch.save({1: torch.ones(1).expand(3)}, tmp_path / "in.ckpt")
    assert cli.main(["average", str(tmp_path / "in.ckpt"), "-o", str(tmp_path / "out.ckpt")]) == 0
    assert torch.load(tmp_path / "out.ckpt")[1].tolist() == [1.0, 1.0, 1.0]


def test_an_unexpected_error_names_the_files(tmp_path: Path, monkeypatch, capsys) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise TypeError("of\nsome kind")

    monkeypatch.setattr(cli, "mean_of_checkpoints", fails)
    assert cli.main(["average", "a.ckpt", "b.ckpt", "-o", str(tmp_path / "out.ckpt")]) == 1
    assert capsys.readouterr().err == "lightning-optim: a.ckpt, b.ckpt: TypeError: of\n"
