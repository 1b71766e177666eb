"""The docs: every public name has a row, with the defaults of the code; the picture is that of the code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import lightning_optim
from lightning_optim.runtime import refusals

ROOT = Path(lightning_optim.__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
ROWS = [(page, line) for page in PAGES for line in page.read_text().splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", lightning_optim.__all__)
def test_each_public_name_has_a_row(name: str) -> None:
    found = [line for _, line in ROWS if re.search(rf"`{name}\b", line.split("|")[1])]
    assert found, f"no table of the docs has a row for {name}"


def calls() -> list[tuple[str, str, str]]:
    """Return the calls in the first columns of the cards' tables: an id, the name, the arguments."""
    found = []
    for page, line in (row for row in ROWS if row[0].parent.name == "techniques"):
        for name, arguments in re.findall(r"`([A-Za-z_.]+)\(([^`]*)\)`", line.split("|")[1]):
            if name in lightning_optim.__all__:
                found.append((f"{page.name}: {name}({arguments})", name, arguments))
    return found


@pytest.mark.parametrize("call", [call for call in calls() if "=" in call[2]], ids=lambda call: call[0])
def test_defaults_in_a_row_are_those_of_the_code(call: tuple[str, str, str]) -> None:
    _, name, arguments = call
    parameters = inspect.signature(getattr(lightning_optim, name)).parameters
    for keyword, shown in re.findall(r"([a-z_]+)=((?:\"[^\"]*\"|[^,\s]+))", arguments):
        assert keyword in parameters, f"{name} has no argument {keyword}"
        try:
            value = ast.literal_eval(shown)
        except (ValueError, SyntaxError):
            continue  # a letter or an ellipsis that stands for a value
        default = parameters[keyword].default
        if default not in (None, inspect.Parameter.empty):
            assert value == default, f"{name} has {keyword}={default!r}, and the row shows {shown}"


def written_calls() -> list[tuple[str, ast.Call]]:
    """Return the calls of public names in the code of all pages, inline or in blocks: the page, and the parsed call."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("…", "...").replace("\\|", "|")
        blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for code in [*blocks, *(" ".join(piece.split()) for piece in inline)]:
            try:
                tree = ast.parse(code)
            except SyntaxError:
                continue  # a formula, a command, or arguments that are left out
            calls_in = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
            found += [(page.name, c) for c in calls_in if getattr(c.func, "id", None) in lightning_optim.__all__]
    return found


def test_calls_in_the_text_have_arguments_of_the_code() -> None:
    checked = written_calls()
    assert len(checked) > 150
    for page, call in checked:
        signature = inspect.signature(getattr(lightning_optim, ast.unparse(call.func)))
        try:
            signature.bind_partial(*call.args, **{str(keyword.arg): None for keyword in call.keywords})
        except TypeError as error:
            pytest.fail(f"{page}: `{ast.unparse(call)}`: {error}")


def test_files_and_tests_that_are_named_exist() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = [(page.name, name) for page in PAGES for name in re.findall(r"`([^`\n]+)`", page.read_text())]
    tests = [(page, name) for page, name in named if re.fullmatch(r"test_\w+", name)]
    assert tests
    for page, name in tests:
        assert f"def {name}(" in code, f"{page} names the test {name}"
    paths = [
        (page, name) for page, name in named if re.fullmatch(r"(tests|docs|examples|benchmarks|\.ci)/[\w./-]*", name)
    ]
    assert paths
    for page, name in paths:
        top = ROOT / name.split("/")[0]  # a source distribution lacks some folders
        assert (ROOT / name).exists() or not top.exists(), f"{page} names {name}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_picture_is_that_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "draw.py")
    assert spec is not None and spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    page = draw.PAGE.read_text()
    assert page == draw.written(page), "run `python docs/draw.py --write`"
    assert len(page.splitlines()) < 120, "the architecture fits on two screens"


# ---- what is supported -----------------------------------------------------------------------------------------------

SUPPORT = (ROOT / "docs" / "support.md").read_text()


def environments() -> dict[str, dict[str, str]]:
    """Return the table that `.ci/versions` writes: a row by the name of the environment, a cell by its column."""
    table = SUPPORT.partition("<!-- begin: .ci/versions -->\n")[2].partition("<!-- end -->")[0].splitlines()
    columns, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0].strip("`"): dict(zip(columns, row, strict=True)) for row in rows}


def test_each_environment_was_run() -> None:
    listed = re.findall(r"^(\w+) +(3\.\d+) +(lightning\.pytorch|pytorch_lightning)$", ci("versions"), re.MULTILINE)
    assert [name for name, *_ in listed] == list(environments())
    for name, python, package in listed:
        row = environments()[name]
        assert row["Python"].startswith(f"{python}.") and row["the tests import"] == f"`{package}`"
        assert re.fullmatch(r"\d{3,} passed(, \d+ skipped)?", row["tests"]), f"{name}: {row['tests']}"
    assert environments()["alone"]["lightning"] == "none"


def test_the_floors_are_those_that_were_run() -> None:
    lowest = environments()["lowest"]
    required = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "lightning", "torchmetrics", "jsonargparse"):
        floor = re.search(rf'"{name}(?:\[\w+\])?>=([\w.]+)', required)
        assert floor and lowest[name] == floor[1], f"{name} {lowest[name]} was run"
    assert lowest["pytorch-lightning"] == lowest["lightning"]
    assert f'requires-python = ">={lowest["Python"].rpartition(".")[0]}"' in required


def ci(name: str) -> str:
    path = ROOT / ".ci" / name
    if not path.exists():
        pytest.skip("a source distribution has no .ci")
    return path.read_text()


def test_refusals_are_quoted_as_they_are() -> None:
    said = set(refusals._STRATEGIES.values())
    assert said == {text for text in said if text in SUPPORT}
