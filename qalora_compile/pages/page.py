"""`Page`: a sequence of headings, texts, tables, maps and charts, written as one HTML file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_files
from qalora_compile.optional import require
from qalora_compile.pages.charts import Chart
from qalora_compile.pages.heat import bar_rows, heat_blocks
from qalora_compile.pages.layer_names import by_kind
from qalora_compile.pages.numbers import number_text

_HERE = Path(__file__).parent
_TEMPLATE, _STYLE = "page.html.jinja", "page.css"
_CARDS = 4
"""A table with so many columns becomes a list of cards where the page is narrow."""
_BREAKABLE = re.compile(r"(?<=[./_,:=])(?=[^\s\d./_,:=])")


@dataclass(frozen=True)
class Mark:
    """A text with a verdict, which has weight, a sign and a colour.

    Attributes:
        text: What is shown.
        good: True for ✓, False for ✗, None where neither is known.
    """

    text: str
    good: bool | None

    @property
    def signed(self) -> str:
        """The text after its sign."""
        return f"{'?' if self.good is None else '✓' if self.good else '✗'} {self.text}"

    @property
    def tone(self) -> str:
        """The class of the style."""
        return "open" if self.good is None else "good" if self.good else "bad"


@dataclass(frozen=True)
class _Cell:
    text: str
    number: bool = False
    tone: str = ""


class Page:
    """One HTML page, filled from top to bottom.

    Every text is escaped. The file has no external references and no script, and the same calls
    give the same bytes. It can be read from 400 pixels of width on, in light and dark, and printed.

    Args:
        title: Title of the page.
        subtitle: One line below the title.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title, self._subtitle = title, subtitle
        self._blocks: list[dict[str, Any]] = []
        self._into = self._blocks
        self._sections = self._charts = 0

    def section(self, heading: str, *paragraphs: str) -> None:
        """Begin a section with a heading, which the contents list too, and paragraphs of text."""
        self._sections += 1
        key = f"section-{self._sections}"
        self._into.append({"kind": "section", "heading": heading, "key": key})
        self.text(*paragraphs)

    def text(self, *paragraphs: str) -> None:
        """Paragraphs of text."""
        self._into += [{"kind": "text", "text": paragraph} for paragraph in paragraphs]

    def verdict(self, mark: Mark, text: str = "") -> None:
        """A verdict in large letters, and one sentence on it."""
        shown = _Cell(mark.signed, tone=mark.tone)
        self._into.append({"kind": "verdict", "mark": shown, "text": text})

    def facts(self, rows: Mapping[str, object]) -> None:
        """Names and values, in as many columns as the page has room for."""
        pairs = [(name, _cell(value)) for name, value in rows.items()]
        self._into.append({"kind": "facts", "rows": pairs})

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        caption: str = "",
        *,
        style: str = "",
    ) -> None:
        """A table; numbers are aligned right and written by `numbers.number_text`.

        Args:
            columns: Headings.
            rows: Cells: texts, numbers or `Mark`s.
            caption: Text above the table.
            style: A further class of `page.css`.

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
        self._into.append(
            {
                "kind": "table",
                "columns": list(zip(columns, numeric, strict=True)),
                "rows": cells,
                "caption": caption,
                "style": " ".join(filter(None, (style, "cards" * (len(columns) >= _CARDS)))),
            }
        )

    def layer_tables(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Folded tables, one for each kind of layer; the first column holds the layers' paths.

        Raises:
            UserInputError: see `table`.
        """
        for kind, places in by_kind([str(row[0]) for row in rows]).items():
            with self.fold(kind, f"{len(places)} layer{'s' * (len(places) > 1)}"):
                self.table(columns, [rows[place] for place in places])

    def layer_map(
        self, values: Mapping[str, float], caption: str = "", *, top: float | None = None
    ) -> None:
        """One number for each layer: a heat map for each stack of blocks, bars for other layers.

        Colours and bars begin at zero.

        Args:
            values: Path of a layer → its number, 0 or more.
            caption: Text below the map.
            top: The number with the full colour or the longest bar; None takes the largest of the
                maps, and for bars that of the bars.
        """
        maps, rest = heat_blocks(values, top)
        if maps:
            maps[-1]["caption"] = caption
        self._into += maps
        if rest:
            self.bars({name: values[name] for name in rest}, "" if maps else caption, top=top)

    def bars(
        self, values: Mapping[str, float], caption: str = "", *, top: float | None = None
    ) -> None:
        """Bars by name, from zero.

        Args:
            values: Name → number. One that is not finite has the longest bar.
            caption: Text above the bars.
            top: The number with the longest bar; None takes the largest.
        """
        self._into.append({"kind": "bars", "rows": bar_rows(values, top), "caption": caption})

    def chart(self, chart: Chart, caption: str = "") -> None:
        """A chart, with its remarks below it; consecutive charts share a row of a wide page."""
        shown = {
            "svg": _own_ids(chart.svg, f"chart-{self._charts}-"),
            "caption": caption,
            "remarks": chart.remarks,
        }
        self._charts += 1
        if self._into and self._into[-1]["kind"] == "charts":
            self._into[-1]["charts"].append(shown)
        else:
            self._into.append({"kind": "charts", "charts": [shown]})

    @contextmanager
    def fold(self, label: str, remark: str = "") -> Iterator[None]:
        """What is added in the block is folded, and a click on `label` unfolds it."""
        outer, inner = self._into, list[dict[str, Any]]()
        self._into = inner
        try:
            yield
        finally:
            self._into = outer
        outer.append({"kind": "fold", "label": label, "remark": remark, "blocks": inner})

    def code(self, text: str, caption: str = "") -> None:
        """Preformatted text."""
        self.side_by_side((caption, text))

    def side_by_side(self, *columns: tuple[str, str], fold: str = "") -> None:
        """Preformatted texts in columns, each below its caption.

        Args:
            columns: Caption and text of each column.
            fold: Label of the control that unfolds long texts; "" shows them unfolded.
        """
        if fold:
            with self.fold(fold):
                self.side_by_side(*columns)
            return
        self._into.append({"kind": "columns", "columns": columns})

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
        environment.filters["soft"] = _soft
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
    if isinstance(value, Mark):
        return _Cell(value.signed, tone=value.tone)
    if isinstance(value, bool):
        return _Cell("yes" if value else "no")
    if isinstance(value, (int, float)):
        return _Cell(number_text(value), number=True)
    return _Cell(str(value))


def _soft(text: str) -> str:
    """The text, escaped, with places where a long path may break."""
    return "<wbr>".join(escape(part) for part in _BREAKABLE.split(text))


def _own_ids(svg: str, prefix: str) -> str:
    """The drawing with ids that are unique on the page."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{prefix}", svg)
