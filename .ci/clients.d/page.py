"""Run the Python code of a page in `docs/with/`, as one script in an empty folder: `python page.py PAGE`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Our warnings are errors, as in the tests: an example that warns is a wrong example. Those of others are theirs. The
# page of chemprop says of one that it comes, and why.
RUN = """
import runpy, sys, warnings
warnings.simplefilter("ignore")
warnings.filterwarnings("error", module="lightning_optim")
warnings.filterwarnings("ignore", message=".*also used layers of the first member")
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def script_of(text: str) -> str:
    """Return the Python blocks of a page, each at its lines of the page, so that errors name them."""
    lines = [""] * (text.count("\n") + 1)
    for block in re.finditer(r"```python\n(.*?)```", text, flags=re.DOTALL):
        code = block[1].splitlines()
        first = text[: block.start(1)].count("\n")
        lines[first : first + len(code)] = code
    return "\n".join(lines)


def main(page: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / f"{Path(page).stem.replace('-', '_')}_page.py"
        script.write_text(script_of(Path(page).read_text()))
        return subprocess.run([sys.executable, "-c", RUN, script.name], cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
