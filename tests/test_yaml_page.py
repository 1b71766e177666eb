"""`docs/yaml.md`: its commands run its script, in their order, in one folder with its first YAML block."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_optim
from tests.harness import pages
from tests.harness.pages import Classifier, Data
from tests.lightning import PACKAGE, LightningCLI

PAGE = pages.ROOT / "docs" / "yaml.md"
COMMANDS = [line for block in pages.blocks(PAGE, "console") for line in block.code.splitlines()]


def ran(command: str, monkeypatch: pytest.MonkeyPatch) -> LightningCLI:
    """Run a command as a shell would, and return what the script has made."""
    assert command.startswith("$ python train.py ")
    monkeypatch.setattr(sys, "argv", shlex.split(command.removeprefix("$ python ")))
    made: list[LightningCLI] = []

    class Kept(LightningCLI):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, save_config_callback=None, **kwargs)
            made.append(self)

    script, *_ = pages.blocks(PAGE, "python")
    code = script.code.replace("from lightning.pytorch.cli import LightningCLI\n", "")
    assert code != script.code
    exec(code, {"__name__": "__main__", "LightningCLI": Kept, "Net": Classifier, "Data": Data})
    (cli,) = made
    assert cli.trainer.state.finished
    return cli


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in pages.TRAINER.items():
        if name != "PL_TRAINER_MAX_EPOCHS":
            monkeypatch.setenv(name, value)
    Path("config.yaml").write_text(pages.blocks(PAGE, "yaml")[0].code)
    resumed = []
    for command in COMMANDS:
        cli = ran(command, monkeypatch)
        if cli.trainer.ckpt_path:
            resumed.append(str(cli.trainer.ckpt_path))
        if "callbacks+=" in command:
            added = command.partition("callbacks+=")[2].split()[0].removeprefix("lightning_optim.")
            assert any(type(one) is getattr(lightning_optim, added) for one in cli.trainer.callbacks), command
    assert [Path(path).name for path in resumed] == ["last.ckpt"], "the second of those with --ckpt_path"


def test_short_names_are_those_that_lightning_does_not_have() -> None:
    """The page names every class that must be written in full."""
    theirs = vars(sys.modules[f"{PACKAGE}.callbacks"])
    both = {name for name in lightning_optim.__all__ if name in theirs}
    # Lightning before 2.6 has fewer of them; the full name is right with every version.
    assert both and all(f"`lightning_optim.{name}`" in PAGE.read_text() for name in both)
