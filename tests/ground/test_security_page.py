"""SECURITY.md names what prevents each threat; the places exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| .+ \| (?P<where>(?:`[\w/.]+`(?:, )?)+) \|$")


def test_every_place_of_the_threat_table_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    table = text.split("## What is not trusted\n")[1].split("\n## ")[0]
    _, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    found = [ROW.match(row) for row in rows]
    assert rows and all(found), "a threat without a place"
    places = [p for row in found if row for p in re.findall(r"`([^`]+)`", row["where"])]
    assert [p for p in places if not (ROOT / "qalora_compile" / p).exists()] == []
