"""`Page`: a sequence of headings, texts, tables and charts, written as one HTML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_files
from qalora_compile.optional import require
from qalora_compile.pages.charts import Chart

_HERE = Path(__file__).parent
_TEMPLATE, _STYLE = "page.html.jinja", "page.css"


@dataclass(frozen=True)
class _Cell:
    text: str
    number: bool


class Page:
    """One HTML page, filled from top to bottom.

    Every text is escaped. The file has no external references and no script, and the same calls
    give the same bytes.

    Args:
        title: Title of the page.
        subtitle: One line below the title.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title, self._subtitle = title, subtitle
        self._blocks: list[dict[str, Any]] = []

    def section(self, heading: str, *paragraphs: str) -> None:
        """Begin a section with a heading, which the contents list too, and paragraphs of text."""
        key = f"section-{sum(b['kind'] == 'section' for b in self._blocks) + 1}"
        self._blocks.append({"kind": "section", "heading": heading, "key": key})
        self.text(*paragraphs)

    def text(self, *paragraphs: str) -> None:
        """Paragraphs of text."""
        self._blocks += [{"kind": "text", "text": paragraph} for paragraph in paragraphs]

    def facts(self, rows: Mapping[str, object]) -> None:
        """Names and values, one per line."""
        pairs = [(name, _cell(value).text) for name, value in rows.items()]
        self._blocks.append({"kind": "facts", "rows": pairs})

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = ""
    ) -> None:
        """A table; numbers are aligned right, and fractions have four significant digits.

        Raises:
            UserInputError: the number of cells in a row is not the number of columns.
        """
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise UserInputError(
                    f"row {index} of the table has {len(row)} cells for {len(columns)} columns",
                    where=caption or ", ".join(columns),
                )
        cells = [[_cell(value) for value in row] for row in rows]
        numeric = [bool(cells) and all(row[i].number for row in cells) for i in range(len(columns))]
        self._blocks.append(
            {
                "kind": "table",
                "columns": list(zip(columns, numeric, strict=True)),
                "rows": cells,
                "caption": caption,
            }
        )

    def chart(self, chart: Chart, caption: str = "") -> None:
        """A chart, with its remarks below it."""
        number = sum(b["kind"] == "chart" for b in self._blocks)
        self._blocks.append(
            {
                "kind": "chart",
                "svg": _own_ids(chart.svg, f"chart-{number}-"),
                "caption": caption,
                "remarks": chart.remarks,
            }
        )

    def code(self, text: str, caption: str = "") -> None:
        """Preformatted text."""
        self.side_by_side((caption, text))

    def side_by_side(self, *columns: tuple[str, str], fold: str = "") -> None:
        """Preformatted texts in columns, each below its caption.

        Args:
            columns: Caption and text of each column.
            fold: Label of the control that unfolds long texts; "" shows them unfolded.
        """
        self._blocks.append({"kind": "columns", "columns": columns, "fold": fold})

    def html(self) -> str:
        """The page as HTML.

        Raises:
            UnsupportedError: jinja2 is not installed.
        """
        jinja = require("jinja2", extra="report", purpose="write a page")
        environment = jinja.Environment(
            loader=jinja.FileSystemLoader(_HERE),
            autoescape=True,
            undefined=jinja.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        text: str = environment.get_template(_TEMPLATE).render(
            title=self._title,
            subtitle=self._subtitle,
            style=(_HERE / _STYLE).read_text("utf-8"),
            blocks=self._blocks,
        )
        return text

    def write(self, path: str | Path, *, overwrite: bool = True) -> Path:
        """Write the page completely or not at all; returns its path.

        Raises:
            UserInputError: the path exists and may not be replaced, or is not a page of this
                package; or its parent is a file.
            UnsupportedError: jinja2 is not installed.
        """
        path = Path(path)
        text = self.html()
        with atomic_files(path, overwrite=overwrite) as scratch:
            scratch.write_text(text, "utf-8")
        return path


def _cell(value: object) -> _Cell:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _Cell(str(value), False)
    return _Cell(f"{value:.4g}" if isinstance(value, float) else str(value), True)


def _own_ids(svg: str, prefix: str) -> str:
    """The drawing with ids that are unique on the page."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{prefix}", svg)
