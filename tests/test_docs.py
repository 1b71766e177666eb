"""The docs: every public name has a row, with the defaults of the code; the picture is that of the code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import lightning_optim
from lightning_optim import EMA, Schedule
from lightning_optim.runtime import refusals
from tests import lightning

ROOT = Path(lightning_optim.__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
ROWS = [(page, line) for page in PAGES for line in page.read_text().splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", lightning_optim.__all__)
def test_each_public_name_has_a_row(name: str) -> None:
    found = [line for _, line in ROWS if re.search(rf"`{name}\b", line.split("|")[1])]
    assert found, f"no table of the docs has a row for {name}"


# ---- cards -----------------------------------------------------------------------------------------------------------


def _is_a(thing: object, cls: type) -> bool:
    return inspect.isclass(thing) and issubclass(thing, cls)


# Base classes and what callbacks of one's own need: docs/extend.md and the section of gradients.md on steps show them.
NO_TECHNIQUE = {
    *("Average", "Clipping", "Criterion", "NormClipping", "OptimCallback", "OptimizerStep", "Penalty", "Policy"),
    *("Proximal", "Schedule", "Slot", "drop_step", "evaluated_state", "gradients_of", "total_steps"),
}
SCHEDULES = {name for name, thing in vars(lightning_optim).items() if _is_a(thing, Schedule)}
HEADINGS = {page: page.read_text() for page in PAGES if page.parent.name == "techniques"}


def card(name: str) -> str:
    """Return the text under the heading of a technique, up to the next one of its level."""
    for text in HEADINGS.values():
        found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
        if found:
            return found[1]
    raise AssertionError(f"docs/techniques has no heading {name}, so that no table can link to it")


@pytest.mark.parametrize("name", sorted({*lightning_optim.__all__} - NO_TECHNIQUE))
def test_each_technique_has_a_card(name: str) -> None:
    """A card begins with a sentence, then an example that uses the technique; a reference has a link."""
    text = card(name)
    sentence = text.strip().partition("\n\n")[0]
    assert sentence.endswith((".", ":")) and not sentence.startswith(("`" * 3, "-", "|")), f"{name}: {sentence}"
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert any(re.search(rf"\b{name}\b", code) for code in examples), f"no example of the card shows {name}"
    if name not in SCHEDULES:  # the page of schedules says these once
        points = re.findall(r"\*\*(.*?)\*\*", text)
        assert {"When it helps", "Where to start", "When it fails", "What it costs"} <= {
            point[0].upper() + point[1:] for point in points
        }, f"{name}: {points}"
        reference = re.search(r"- \*\*Reference\*\*: (.*?)(?=^- |^#|\n\n|\Z)", text, flags=re.DOTALL | re.MULTILINE)
        assert reference and re.search(r"\]\((https://|#)", reference[1]), f"the card of {name} has no linked reference"


def test_references_are_links() -> None:
    for page in PAGES:
        bare = re.findall(r"(?<!\[)arXiv:\d{4}\.\d{4,5}", page.read_text())
        assert not bare, f"{page.name}: {bare}"


def test_links_to_a_heading_find_it() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text()):
            linked = (page.parent / target) if target else page
            assert anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_table_of_decays_is_that_of_the_code() -> None:
    rows = re.findall(r"^ +\| (0\.9+) \| ([\d,]+) steps \| ([\d,]+) steps \| ([\d,]+) steps", card("EMA"), re.MULTILINE)
    assert len(rows) == 4
    for decay, back, *after in rows:
        numbers = [int(number.replace(",", "")) for number in (back, *after)]
        assert numbers[0] == round(1 / (1 - float(decay)))
        for warmup, steps in zip((2 / 3, 3 / 4), numbers[1:], strict=True):
            ema = EMA(float(decay), warmup=warmup)
            # The first step has t = 0. A rounding error of the power must not count as a decay that is not reached.
            assert ema.decay_at(steps - 1) > float(decay) - 1e-13 and ema.decay_at(steps - 2) < float(decay) - 1e-13


# ---- calls -----------------------------------------------------------------------------------------------------------


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
        text = page.read_text()
        if page.name == "coming-from.md":  # the first columns have the names of other packages
            text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
        text = text.replace("…", "...").replace("\\|", "|")
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


# ---- other packages --------------------------------------------------------------------------------------------------


def rows_of(package: str) -> list[str]:
    """Return the first columns of the table of a package in coming-from.md."""
    section = (ROOT / "docs" / "coming-from.md").read_text().partition(f"\n## {package}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    return rows[2:]


LIGHTNINGS = (
    *("EarlyStopping", "EMAWeightAveraging", "WeightAveraging"),
    *("StochasticWeightAveraging", "GradientAccumulationScheduler"),
)


@pytest.mark.parametrize("name", LIGHTNINGS)
def test_each_argument_of_lightnings_callbacks_has_a_counterpart(name: str) -> None:
    if not lightning.has(name):
        pytest.skip("this version of Lightning has no such callback")
    shown = " ".join(row for row in rows_of("Lightning") if f"`{name}(" in row)
    arguments = inspect.signature(getattr(lightning, name)).parameters
    assert [a for a in arguments if a != "kwargs" and not re.search(rf"\b{a}\b", shown)] == []


def test_the_flags_of_lightnings_trainer_exist() -> None:
    flags = {
        flag
        for row in rows_of("Lightning")
        for call in re.findall(r"`Trainer\(([^`]*)\)`", row)
        for flag in re.findall(r"(\w+)=", call)
    }
    assert flags and flags <= inspect.signature(lightning.Trainer).parameters.keys()


def test_each_argument_of_ema_pytorch_has_a_counterpart() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    rows = rows_of("ema-pytorch")
    arguments = inspect.signature(ema_pytorch.EMA.__init__).parameters
    named = {name: value for row in rows for name, value in re.findall(r"(\w+)=([\w./]+)", row)}
    for name, value in named.items():
        default = arguments[name].default
        if name not in ("update_every", "update_after_step"):  # with other numbers, to show what they do
            assert eval(value) == default, f"ema-pytorch has {name}={default}"
    if version("ema-pytorch") == "0.8.3":  # that the page was written for
        missing = [
            a for a in arguments if a not in ("self", "model") and not any(re.search(rf"\b{a}\b", r) for r in rows)
        ]
        assert missing == []


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
