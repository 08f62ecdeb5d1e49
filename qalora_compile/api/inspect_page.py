"""The page of `inspect --html`: what was quantized, how, and why, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qalora_compile._version import __version__
from qalora_compile.api.inspect import Row
from qalora_compile.ir.site_plan import QUANTIZE
from qalora_compile.pages import Page

_QUANTIZED = ("path", "kind", "K×N", "bits", "group", "zero-point", "rank", "bytes", "why")
_KEPT = ("path", "kind", "shape", "bytes", "reason")
_FOLDED = ("passes", "notes")
"""Facts that are long: they are folded at the end."""


def inspect_page(title: str, rows: Sequence[Row], facts: Mapping[str, object]) -> Page:
    """A page of the rows of `inspect_program` or `inspect_exported`, and of their overview.

    Args:
        title: Title of the page.
        rows: One for each layer.
        facts: The overview of the rows.
    """
    page = Page(title, f"qalora-compile {__version__}")
    page.section("Settings")
    quantized = [row for row in rows if row["decision"] == QUANTIZE]
    page.facts({name: value for name, value in facts.items() if name not in _FOLDED})
    kept = [row for row in rows if row["decision"] != QUANTIZE]
    sizes = {str(row["path"]): row["bytes"] / 1e3 for row in rows if row["bytes"]}
    if sizes:
        page.section("Size of each layer", "In kB. What several layers share counts for one.")
        page.layer_map(sizes)
    if quantized:
        reasons = ", ".join(dict.fromkeys(str(row["reason"]) for row in quantized))
        page.section("Quantized layers", f"{len(quantized)} layers: {reasons}.")
        page.layer_tables(*_cells(_QUANTIZED, quantized))
    if kept:
        page.section("Kept in float", f"{len(kept)} layers, and why.")
        page.table(*_cells(_KEPT, kept))
    for name in _FOLDED:
        if facts.get(name):
            with page.fold(name):
                page.text(*str(facts[name]).split(" → "))
    return page


def _cells(columns: Sequence[str], rows: Sequence[Row]) -> tuple[list[str], list[list[object]]]:
    """The columns in which some row has a value, and the cells of each row."""
    used = [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]
    return used, [["" if row.get(c) is None else row[c] for c in used] for row in rows]
