"""Print the results of `run.py` as a table, or write it into a page: `python table.py [--write PAGE] RESULT.json …`."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin: .ci/clients --write -->", "<!-- end: .ci/clients -->"


def table(results: list[dict[str, Any]]) -> str:
    """Return the table, with the sentences of what is not simply "ok" below it."""
    notes: list[str] = []
    rows = ["| callback | " + " | ".join(result["name"] for result in results) + " |"]
    rows.append("| --- |" + " --- |" * len(results))
    for row in results[0]["results"]:
        cells = [cell(result["results"].get(row, ""), notes) for result in results]
        rows.append(f"| {row} | " + " | ".join(cells) + " |")
    versions = {name: number for result in results for name, number in result["versions"].items()}
    date = datetime.date.today().isoformat()
    head = f"On {date}, with " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ":"
    listed = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([head, "", *rows, "", *listed]).rstrip()


def cell(outcome: str, notes: list[str]) -> str:
    """Return the first words of an outcome, and the number of a note with the rest."""
    short, separator, note = outcome.partition(": ")
    if not separator:
        return short
    if note not in notes:
        notes.append(note)
    return f"{short} ({notes.index(note) + 1})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page, which has the two marks")
    parser.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    text = table([json.loads(path.read_text()) for path in arguments.results])
    print(text)
    if arguments.write:
        before, _, rest = arguments.write.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        arguments.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
