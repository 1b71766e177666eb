"""The page of the command line: each command prints what the page shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from lightning_optim import cli
from tests.harness import pages
from tests.harness.pages import ROOT, blocks
from tests.lightning import PACKAGE

PAGE = ROOT / "docs" / "command-line.md"
GIVEN = "from tests.harness.pages import given\n\nglobals().update(given())\n"


def masked(text: str) -> str:
    return re.sub(r"of Lightning [\w.+]+", "of Lightning", text)


def printed(command: str, capfd: pytest.CaptureFixture) -> str:
    """Return what a command prints, its errors too, which follow the output."""
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "lightning-optim"
    try:
        cli.main(arguments)
    except SystemExit as stop:
        assert stop.code in (0, 2)
    out, err = capfd.readouterr()
    return f"{command}\n{out}{err}"


def test_commands_print_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, value in pages.TRAINER.items():
        monkeypatch.setenv(name, value)
    python = blocks(PAGE, "python")
    torch.manual_seed(6)  # of the weights that the page's training begins with: this soup leaves a checkpoint out
    pages.run(PAGE, python, pages.given())
    (score,) = [block.code for block in python if "def accuracy" in block.code]
    Path("my_score.py").write_text(GIVEN + score.replace("lightning.pytorch", PACKAGE))
    capfd.readouterr()
    found = blocks(PAGE, "console")
    commands = [command for block in found for command in re.findall(r"^\$ .*", block.code, flags=re.MULTILINE)]
    assert {command.split()[2] for command in commands} == {"average", "inspect", "soup"}
    for block in found:
        commands = re.findall(r"^\$ .*", block.code, flags=re.MULTILINE)
        shown = "".join(printed(command, capfd) for command in commands)
        assert masked(block.code) == masked(shown), f"line {block.line} of {PAGE.name}"


def test_the_page_names_each_option() -> None:
    text = PAGE.read_text()
    for command in ("average", "soup", "inspect"):
        assert f"## {command}" in text
    parser = cli._parser()
    commands = next(action for action in parser._actions if isinstance(action.choices, dict))
    for command in commands.choices.values():  # type: ignore[union-attr]
        for option in command._option_string_actions:
            assert option in ("-h", "--help") or f"`{option}" in text, option
