"""List what an environment needs, and write the table of environments in docs/support.md: for `.ci/versions`.

support.py requirements [--floors] [--without NAME]   the requirements in pyproject.toml, or the lowest versions
support.py row NAME PACKAGE LOG                        one row of the table, for the Python that runs this
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
SHOWN = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "numpy", "jsonargparse")
EXTRAS = ("cli", "safetensors", "test", "docs")


def requirements(floors: bool, without: str | None) -> Iterator[str]:
    """Yield the requirements of the package and of its extras, or `name==floor` for each."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    listed += [line for extra in EXTRAS for line in project["project"]["optional-dependencies"][extra]]
    for line in dict.fromkeys(listed):
        name, brackets, floor = re.fullmatch(r"([\w-]+)(\[.*?\])?>=([\w.]+).*|(?:.*)", line).groups()
        if name is None or name == without:
            continue  # the package itself, with extras
        yield f"{name}{brackets or ''}=={floor}" if floors else line.replace(" ", "")
        if floors and name == "lightning":
            yield f"pytorch-lightning=={floor}"  # which lightning requires in any version
    if floors:
        yield "numpy==1.25.0"  # the lowest that all of them take


def row(name: str, package: str, log: Path) -> str:
    """Return a row of the table: the versions that are installed, and the last line of a log of pytest."""
    found = []
    for distribution in SHOWN:
        try:
            found.append(importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            found.append("none")
    counts = re.findall(r"(\d+ (?:passed|skipped|failed|errors?))", log.read_text().splitlines()[-1])
    cells = [f"`{name}`", platform.python_version(), *found, f"`{package}`"]
    return f"| {' | '.join(cells)} | {', '.join(counts) or 'did not run'} | {datetime.date.today()} |"


def write(name: str, line: str) -> None:
    """Put a row in the place of the one of the same environment."""
    text = PAGE.read_text()
    begin, rows, end = re.fullmatch(
        r"(.*<!-- begin: \.ci/versions -->\n)(.*)(<!-- end -->.*)", text, re.DOTALL
    ).groups()
    kept = rows.splitlines()
    index = next((i for i, old in enumerate(kept) if old.startswith(f"| `{name}` ")), len(kept))
    kept[index : index + 1] = [line]
    PAGE.write_text(begin + "\n".join(kept) + "\n" + end)


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("requirements")
    listing.add_argument("--floors", action="store_true")
    listing.add_argument("--without")
    adding = commands.add_parser("row")
    adding.add_argument("name")
    adding.add_argument("package")
    adding.add_argument("log", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "requirements":
        print("\n".join(requirements(arguments.floors, arguments.without)))
    else:
        write(arguments.name, row(arguments.name, arguments.package, arguments.log))


if __name__ == "__main__":
    main()
