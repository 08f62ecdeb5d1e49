"""SECURITY.md names what prevents each threat; the places exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| .+ \| (?P<where>(?:`[\w/.]+`(?:, )?)+) \|$", re.MULTILINE)


def test_every_place_of_the_threat_table_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    places = [p for row in ROW.finditer(text) for p in re.findall(r"`([^`]+)`", row["where"])]
    assert len(places) >= 18
    assert [p for p in places if not (ROOT / "qalora_compile" / p).exists()] == []
