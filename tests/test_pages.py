"""Every example of the docs is run, and none of them makes a warning of this package."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import lightning_optim
from lightning_optim import OptimCallback
from tests.harness import pages
from tests.harness.pages import PAGES, ROOT, Classifier, Data, blocks
from tests.lightning import LightningCLI, ModelCheckpoint, Trainer

WITH = ROOT / "docs" / "with"  # their blocks need other packages: `.ci/clients` runs them


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in pages.TRAINER.items():
        monkeypatch.setenv(name, value)


def with_blocks(language: str) -> list[Path]:
    """Return the pages whose blocks run here; `test_readme.py` runs those of the README, the first one alone."""
    return [page for page in PAGES if page.parent != WITH and page.name != "README.md" and blocks(page, language)]


@pytest.mark.parametrize("page", with_blocks("python"), ids=title)
def test_blocks_run_in_their_order(page: Path) -> None:
    pages.run(page, blocks(page, "python"), pages.given())


def test_what_choose_says_to_turn_on_runs(tmp_path: Path) -> None:
    """Each callback in the second column can be made; the first of each class run together."""
    page = ROOT / "docs" / "choose.md"
    cells = [line.split("|")[2] for line in page.read_text().splitlines() if "](techniques/" in line]
    letters = {
        "s": 1e-4,
        "p": 0.1,
        "b": 0.05,
        "c": 3.0,
        "n": 4,
        "F": None,
        "count_tokens": lambda batch: len(batch[1]),
        "ModelCheckpoint": None,
    }
    names = {**vars(lightning_optim), **letters, "model": Classifier()}
    made = {}
    for code in [code for cell in cells for code in re.findall(r"`([A-Z]\w+\([^`]*\))`", cell)]:
        if "..." not in code:
            callback = eval(code, names)
            made.setdefault(type(callback), callback)
    callbacks = [callback for callback in made.values() if isinstance(callback, OptimCallback)]
    assert len(callbacks) >= 8
    trainer = Trainer(
        max_epochs=16, callbacks=[ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=5), *callbacks]
    )
    data = pages.given()
    trainer.fit(data["model"], data["train_loader"], data["val_loader"])


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=title)
def test_yaml_trains(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [block.code for block in blocks(page, "python") if block.code.startswith("def ")]
    Path("my_package.py").write_text("\n\n".join(functions))
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    for block in blocks(page, "yaml"):
        Path("config.yaml").write_text(block.code)
        cli = LightningCLI(Classifier, Data, args=["fit", "--config", "config.yaml"], save_config_callback=None)
        assert cli.trainer.state.finished


def test_other_packages_pages_are_run_by_the_script_of_clients() -> None:
    script = ROOT / ".ci" / "clients"
    if not script.exists():
        pytest.skip("a source distribution has no .ci")
    packages = re.search(r"^all=\((.*)\)$", script.read_text(), flags=re.MULTILINE)
    assert packages and sorted(packages[1].split()) == sorted(page.stem for page in WITH.glob("*.md"))
    assert '.ci/clients.d/page.py "docs/with/$package.md"' in script.read_text()
    spec = importlib.util.spec_from_file_location("page", ROOT / ".ci" / "clients.d" / "page.py")
    assert spec is not None and spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    for page in WITH.glob("*.md"):
        run = runner.script_of(page.read_text())
        assert {block.language for block in blocks(page)} == {"python"}
        assert all(block.code in run for block in blocks(page))


# Who runs or compares the blocks of a page that are not Python or YAML.
OTHERS = {
    ("console", "docs/command-line.md"): "test_command_line_page.py",
    ("console", "docs/yaml.md"): "test_yaml_page.py",
    ("text", "README.md"): "test_readme.py",
    ("text", "docs/architecture.md"): "test_docs.py",
    ("text", "docs/logged.md"): "test_logged_names.py",
    ("toml", "docs/support.md"): None,  # settings of another tool
}


def test_each_kind_of_block_has_a_runner() -> None:
    kinds = {(block.language, title(page)) for page in PAGES for block in blocks(page)}
    assert {kind for kind in kinds if kind[0] not in ("python", "yaml")} <= OTHERS.keys()
    for name in filter(None, OTHERS.values()):
        assert (ROOT / "tests" / name).exists()
    for page in PAGES:  # a fence that the pattern misses would be an example that nothing runs
        assert len(re.findall(r"^ *```", page.read_text(), flags=re.MULTILINE)) == 2 * len(blocks(page)), page.name


def test_pages_with_doctests_are_collected() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    for page in PAGES:
        if ">>> " in page.read_text():
            assert f'"--doctest-glob={page.name}"' in settings and f'"docs/{page.name}"' in settings
