"""Try every callback in one third-party package: `python run.py PACKAGE [--only TEXT] [--out FILE]`."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import re
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path

from cells import CELLS, Cell
from client import Client, Fit

import lightning_optim

OURS = Path(lightning_optim.__file__).parent
FABRIC = ("lightning.fabric", "lightning_fabric", "lightning_utilities")
TALKATIVE = ("lightning.pytorch", "pytorch_lightning", *FABRIC, "darts")  # loggers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package")
    parser.add_argument("--only", default="", help="run the rows that contain this text")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    client: Client = importlib.import_module("train_" + arguments.package.replace("-", "_")).CLIENT()
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    plain, results = client.fit(), {}
    for row, function in CELLS.items():
        if arguments.only in row:
            begin = time.monotonic()
            results[row] = outcome(client, plain, row, function)
            print(f"{client.name}: {row}: {results[row]} ({time.monotonic() - begin:.1f} s)", flush=True)
    if arguments.out:
        used = [client.name, client.lightning.__name__.partition(".")[0].replace("_", "-"), "torch"]
        versions = {name: version(name) for name in used}
        arguments.out.write_text(json.dumps({"name": client.name, "versions": versions, "results": results}))
    return int(any(result.startswith("WRONG") for result in results.values()))


def outcome(client: Client, plain: Fit, row: str, function: Cell) -> str:
    """Run a cell, and return "ok", the sentence of the refusal that is expected there, or what is wrong."""
    if row in client.missing:
        return f"no way: {client.missing[row]}"
    expected = client.refused.get(row)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(client, plain, Path(folder))
    except Exception as error:
        if expected and re.search(expected, str(error)) and raised_by_us(error):
            return f"refused: {error}"
        traceback.print_exc()
        return f"WRONG: {type(error).__name__}: {error}"
    if expected is not None:
        return "WRONG: it is not refused any more"
    found = judged(client.warns.get(row), {str(w.message) for w in caught if OURS in Path(w.filename).parents})
    return f"ok in part: {client.partly[row]}" if found == "ok" and row in client.partly else found


def judged(expected: str | None, warned: set[str]) -> str:
    """Return the outcome of a cell in which nothing is wrong, from the warnings of `lightning_optim` in it."""
    if unexpected := [sentence for sentence in warned if expected is None or not re.search(expected, sentence)]:
        return f"WRONG: it warns: {unexpected}"
    if expected is not None and not warned:
        return "WRONG: it does not warn any more"
    return "ok" if expected is None else f"ok, with a warning: {min(warned)}"


def raised_by_us(error: Exception) -> bool:
    """Return True if the error was raised in `lightning_optim`: the sentence is one of ours."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return OURS in Path(last.filename).parents


if __name__ == "__main__":
    sys.exit(main())
