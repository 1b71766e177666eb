"""The files around the package: versions agree, workflows run what there is, and the source distribution has it all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_optim
from tests.harness.pages import PAGES

ROOT = Path(lightning_optim.__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BY_THEMSELVES = {"README.md", "LICENSE", "pyproject.toml"}  # hatchling adds them to every source distribution


def value(name: str) -> str:
    """Return a text of pyproject.toml: Python 3.10 has no reader of TOML."""
    found = re.search(rf'^{name} = "(.*)"$', PROJECT, re.MULTILINE)
    assert found, name
    return found[1]


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def steps(job: dict[str, Any]) -> list[dict[str, Any]]:
    return list(job["steps"])


# ---- versions --------------------------------------------------------------------------------------------------------


def test_the_citation_is_that_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # those that the schema requires
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert str(citation["version"]) == value("version")
    assert (citation["license"], citation["title"]) == (value("license"), value("name"))
    assert citation["abstract"] == value("description")
    assert all(author.keys() & {"name", "family-names"} for author in citation["authors"])


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in (value("version"), "Unreleased")
    assert f"## To {value('version')}" in (ROOT / "docs" / "upgrading.md").read_text()


def test_the_classifiers_are_the_versions_that_were_run() -> None:
    listed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    ran = re.findall(r"^\| `\w+` \| (3\.\d+)\.", (ROOT / "docs" / "support.md").read_text(), re.MULTILINE)
    assert listed == sorted(set(ran), key=lambda version: int(version[2:]))
    assert value("requires-python") == f">={listed[0]}"


def test_the_floors_in_the_policy_are_those_of_the_requirements() -> None:
    policy = " ".join((ROOT / "docs" / "versions.md").read_text().split())
    for name in ("torch", "lightning"):
        floor = re.search(rf'"{name}>=(\d+\.\d+)', PROJECT)
        assert floor and re.search(rf"{name} {re.escape(floor[1])}\b", policy, re.IGNORECASE)
    assert f"Python {value('requires-python')[2:]}," in policy


def test_ruff_before_a_commit_is_the_lowest_that_is_allowed() -> None:
    floor = re.search(r'"ruff>=([\d.]+)"', PROJECT)
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert floor and repository["rev"] == f"v{floor[1]}"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]


# ---- workflows -------------------------------------------------------------------------------------------------------


def test_there_are_three() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "release", "tests"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_read_only_and_names_its_actions_by_version(path: Path) -> None:
    told = yaml.safe_load(path.read_text())
    assert told["permissions"] == {"contents": "read"}
    assert True in told, "YAML reads `on` as true"
    for name, job in told["jobs"].items():
        assert job["timeout-minutes"] > 0, name
        for step in steps(job):
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1")), step
            # What others write, such as the title of a pull request, would be part of the command.
            assert "${{ github" not in step.get("run", "")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_there_is(path: Path) -> None:
    text = path.read_text()
    for script in re.findall(r"(?<![\w/])\.ci/\w+", text):
        assert (ROOT / script).exists(), script
    for file in re.findall(r"(?<![\w/$])tests/[\w/.]+", text):
        assert (ROOT / file).exists(), file
    for extra in re.findall(r'\[(\w+)\]"', text):
        assert re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE), extra


def test_the_workflow_runs_the_environments_of_the_support_matrix() -> None:
    listed = re.findall(r"^(\w+) +(3\.\d+) +\S+$", (ROOT / ".ci" / "versions").read_text(), re.MULTILINE)
    job = workflow("tests")["jobs"]["versions"]
    assert job["strategy"]["matrix"]["environment"] == [name for name, _ in listed]
    (setup,) = [step for step in steps(job) if "setup-python" in step.get("uses", "")]
    assert set(setup["with"]["python-version"].split()) == {python for _, python in listed}


def test_only_the_job_that_publishes_may_ask_for_a_token() -> None:
    jobs = workflow("release")["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and "permissions" not in jobs["build"]
    assert jobs["publish"]["needs"] == "build" and jobs["publish"]["environment"] == "pypi"
    assert [step["uses"].split("@")[0] for step in steps(jobs["publish"])][-1] == "pypa/gh-action-pypi-publish"
    assert not any("password" in step.get("with", {}) for step in steps(jobs["publish"]))
    assert "pipx run build" in [step.get("run") for step in steps(jobs["build"])]


# ---- files that are named --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "docs/versions.md", "docs/upgrading.md"])
def test_what_a_page_names_exists(name: str) -> None:
    page = ROOT / name
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for file in re.findall(r"`((?:\.ci|\.github|docs|tests|examples|lightning_optim)/[\w./-]*)`", text):
        assert (ROOT / file).exists(), file


def test_the_source_distribution_has_what_the_tests_read() -> None:
    listed = re.search(r"\[tool\.hatch\.build\.targets\.sdist\]\n(?:#.*\n)?include = \[(.*?)\]", PROJECT, re.DOTALL)
    assert listed
    included = {name.strip("/") for name in re.findall(r'"(.*?)"', listed[1])}
    assert all((ROOT / name).exists() for name in included)
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    read = set(re.findall(r'ROOT / "([\w.-]+)"', code)) | {"tests", "conftest.py", "lightning_optim"}
    linked = {
        (page.parent / target).resolve().relative_to(ROOT.resolve()).parts[0]
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in target
    }
    wanted = {name for name in read | linked if (ROOT / name).exists()} - BY_THEMSELVES
    assert {".ci", ".github", "docs", "tests", "CHANGELOG.md"} <= wanted
    assert wanted <= included, wanted - included
