"""Write the table of docs/reference/clients.md from the rows that client tests have recorded.

`python -m scripts.write_clients FOLDER` takes the JSON files that `tests.clients.record` wrote to
FOLDER. Rows of tests that were not run are kept; rows of tests that exist no longer are dropped.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.clients.record import ClientRow, record_client

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "clients.md"
BEGIN, END = "<!-- clients: begin -->\n", "<!-- clients: end -->\n"
_HEAD = ("client", "version", "target", "model", "result", "speed", "test")


def recording_tests() -> Iterator[str]:
    """Every test that calls `record_client`, as pytest names it."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text("utf-8")
        if record_client.__name__ not in text or path.name == "test_record.py":
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                calls = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
                if any(isinstance(f, ast.Name) and f.id == record_client.__name__ for f in calls):
                    yield f"{path.relative_to(ROOT).as_posix()}::{node.name}"


def read_rows(page: str) -> list[ClientRow]:
    """The rows between the marks of the page."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    named = [dict(zip(_HEAD, row, strict=True)) for row in cells]
    return [ClientRow(**{**row, "test": row["test"].strip("`")}) for row in named]


def with_rows(page: str, rows: list[ClientRow]) -> str:
    """The page with these rows between its marks."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    for row in rows:
        cells = (row.client, row.version, row.target, row.model, row.result, row.speed)
        lines.append(f"| {' | '.join(cells)} | `{row.test}` |")
    before, _, rest = page.partition(BEGIN)
    return "\n".join((before + BEGIN + lines[0], *lines[1:], END)) + rest.partition(END)[2]


def merged(old: list[ClientRow], new: list[ClientRow]) -> list[ClientRow]:
    """Old rows of tests that still record but were not run now, and the new ones, in order."""
    there, ran = set(recording_tests()), {row.test for row in new}
    kept = [row for row in old if row.test in there and row.test not in ran]
    return sorted([*kept, *new], key=lambda row: (row.client.lower(), row.target, row.model))


def main(folder: str) -> int:
    """Merge the rows in a folder into the page."""
    files = sorted(Path(folder).glob("*.json"))
    new = [ClientRow(**json.loads(file.read_text("utf-8"))) for file in files]
    page = PAGE.read_text("utf-8")
    rows = merged(read_rows(page), new)
    PAGE.write_text(with_rows(page, rows), "utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(new)} rows from {folder}, {len(rows)} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
