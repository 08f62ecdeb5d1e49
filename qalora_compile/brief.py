"""Short descriptions of objects: a one-line `repr`, and a small table in notebooks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from html import escape

_MOST = 300
"""Largest number of characters that a `repr` shows of a value."""
_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;padding:2px 8px"


class Brief:
    """Derives `__repr__` and `_repr_html_` of a subclass from its `brief`.

    A dataclass that inherits from it is declared with `repr=False`.
    """

    @abstractmethod
    def brief(self) -> Mapping[str, object]:
        """Name → value, without tensors and long lists. Empty values are left out."""

    def __repr__(self) -> str:
        parts = [f"{name}: {_cut(text)}" for name, text in self._texts()]
        return f"<{type(self).__name__}  {'; '.join(parts)}>"

    def _repr_html_(self) -> str:
        """An HTML table without scripts or style sheets; all texts are escaped."""
        rows = "".join(
            f'<tr><th style="{_CELL}">{escape(name)}</th>'
            f'<td style="{_CELL}">{escape(text)}</td></tr>'
            for name, text in self._texts()
        )
        return f"<table><caption><b>{type(self).__name__}</b></caption>{rows}</table>"

    def _texts(self) -> list[tuple[str, str]]:
        return [(n, str(v)) for n, v in self.brief().items() if v not in (None, "", ())]


def megabytes(size: int) -> str:
    """A size in bytes as text in MB, or in kB below 1 MB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST else f"{line[:_MOST]}…"
