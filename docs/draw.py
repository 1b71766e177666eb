"""Draw the folders of the package and their imports, from the code: `python docs/draw.py` prints the picture.

`python docs/draw.py --write` puts it into architecture.md. A test compares the two.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "lightning_optim"
PAGE = Path(__file__).parent / "architecture.md"
BEGIN, END = "<!-- begin: python docs/draw.py --write -->\n```text\n", "```\n<!-- end -->\n"

# From the ground up. What stands in one row does not import each other, but for what the picture says.
FLOORS = (
    ("base",),
    ("runtime/lightning",),
    ("runtime",),
    ("regularization", "gradients", "stopping", "averaging", "resume"),
    ("ensembling",),
)
WALL = "runtime/lightning"


def folder_of(name: str) -> str:
    """Return the folder of a module of the package; the one with Lightning's names is a folder of its own."""
    parts = name.split(".")[1:]
    if parts[:2] == WALL.split("/"):
        return WALL
    return parts[0] if parts and (ROOT / parts[0]).is_dir() else "top"


def imports() -> dict[str, set[str]]:
    """Return for each folder the folders that its files import, and ``lightning`` or ``torchmetrics``."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        own = folder_of(".".join(path.relative_to(ROOT.parent).with_suffix("").parts))
        reached = found.setdefault(own, set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                top = name.split(".")[0]
                if top == "lightning_optim":
                    reached.add(folder_of(name))
                elif top in ("torch", "lightning", "torchmetrics"):
                    reached.add(top)
    return {own: reached - {own, "top"} for own, reached in found.items()}


def about(folder: str) -> str:
    """Return the first line of a folder's docstring."""
    return (ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or "").split("\n")[0]


def picture() -> str:
    """Return the picture: one line for each folder, the roof above, the ground below, and what each imports."""
    reached = imports()
    lines = ["__init__, __main__, cli.py     the public names; the command line   ── import every folder", ""]
    for floor in reversed(FLOORS):
        for folder in floor:
            names = [name for row in FLOORS for name in row if name in reached[folder]]
            outside = [name for name in ("lightning", "torchmetrics") if name in reached[folder]]
            lines.append(f"{folder + '/':<30} {about(folder)}")
            lines.append(f"{'':<30} ──> {', '.join([*names, *outside]) or 'torch alone'}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def written(page: str) -> str:
    """Return the page with the picture as the code has it now."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + picture() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(written(PAGE.read_text()))
    print(picture())
