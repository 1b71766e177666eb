"""The README: its first program prints what stands below it, and each command installs what its example imports."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import pages
from tests.lightning import PACKAGE

ROOT = pages.ROOT
README = ROOT / "README.md"
FIRST, *REST = pages.blocks(README, "python")
PROVIDER = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "lightning.pytorch.cli": "jsonargparse"}


def shape(line: str) -> str:
    """Return a line with each number replaced: another processor has other last digits, and stops elsewhere."""
    return " ".join(re.sub(r"\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "0", line).split())


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run the first program as a user would: alone, in an empty folder."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "first.py").write_text(FIRST.code.replace("lightning.pytorch", PACKAGE))
    # One thread, since the tests share the processors, and the package that is tested, installed or not.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "first.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert [path.name for path in folder.iterdir()] == ["first.py"], "it writes no files"
    return [line for line in f"{run.stderr}\n{run.stdout}".splitlines() if line.strip()]


def test_the_first_program_prints_what_stands_below_it(printed: list[str]) -> None:
    shown = pages.blocks(README)[1]
    assert shown.language == "text"
    lines: Iterator[str] = iter([shape(line) for line in printed])
    for line in shown.code.splitlines():
        if line.strip():
            assert shape(line) in lines, f"{line!r} is not printed, or not after the line before it:\n{printed}"


def test_the_first_program_makes_no_warning_of_ours(printed: list[str]) -> None:
    assert not [line for line in printed if "Warning" in line and "lightning_optim" in line]


def test_the_other_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in pages.TRAINER.items():
        monkeypatch.setenv(name, value)
    for block in REST:
        pages.run(README, [block], pages.given())


# ---- commands --------------------------------------------------------------------------------------------------------


def commands() -> dict[str, set[str]]:
    """Return the example that a command of the README runs, and the extras that the same command installs."""
    found = re.findall(
        r'^ *pip install .*-e "\.\[([\w,]+)\]" && .*?(examples/\w+\.py)', README.read_text(), re.MULTILINE
    )
    return {example: set(extras.split(",")) for extras, example in found}


def test_each_example_has_a_command() -> None:
    assert set(commands()) == {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize(("example", "extras"), commands().items())
def test_a_command_installs_what_its_example_imports(example: str, extras: set[str]) -> None:
    required = (ROOT / "pyproject.toml").read_text()
    listed = [re.search(rf"^{extra} = (\[.*?\])\s*(#.*)?$", required, re.MULTILINE | re.DOTALL) for extra in extras]
    assert all(listed), f"{extras} are extras of pyproject.toml"
    installed = " ".join(found[1] for found in listed if found)
    nodes = ast.walk(ast.parse((ROOT / example).read_text()))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    needed = [PROVIDER[name] for name in PROVIDER if any(f"{module}.".startswith(f"{name}.") for module in imported)]
    assert needed
    for distribution in needed:
        assert distribution in installed, f"{example} needs {distribution}, and {extras} lack it"


# ---- the table of the digits example ---------------------------------------------------------------------------------


DESCRIBE = """
import json, digits
names = [digits.LAST, digits.BEST, *map(str, digits.METHODS), digits.ALL, *digits.ENSEMBLES]
together = ", ".join(map(str, digits.together(digits.METHODS)))
print(json.dumps({"header": digits.line(digits.HEADER), "names": names, "all": f"{digits.ALL}: {together}"}))
"""


def test_the_table_has_the_rows_of_the_example() -> None:
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("the example imports lightning")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    command = [sys.executable, "-c", DESCRIBE]  # of its own, since the tests import one package of Lightning
    digits = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True, timeout=300).stdout)
    _, _, rest = README.read_text().partition(f"{digits['header']}\n")
    rows, _, after = rest.partition("\n\n")
    assert [row.split("|")[1].strip(" `") for row in rows.splitlines()[1:]] == digits["names"]
    assert after.startswith(f"{digits['all']}; at most ")


# ---- links -----------------------------------------------------------------------------------------------------------


def test_links_to_sections_lead_to_a_heading() -> None:
    linked = re.findall(r"\]\(([\w./-]+)#([\w-]+)\)", README.read_text())
    assert linked
    for page, anchor in linked:
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], (
            f"{page} has no heading for #{anchor}"
        )
