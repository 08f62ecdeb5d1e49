"""What an object is in a few words: a short `repr`, and a small table in notebooks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from html import escape

_MOST = 300
"""Characters of a value that a `repr` shows."""
_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;padding:2px 8px"


class Brief:
    """Gives a subclass `__repr__` and `_repr_html_` from what `brief` says.

    A dataclass that inherits from it is declared with `repr=False`.
    """

    @abstractmethod
    def brief(self) -> Mapping[str, object]:
        """What it is, by name; no tensors and no long lists. Empty values are left out."""

    def __repr__(self) -> str:
        parts = [f"{name}: {_cut(text)}" for name, text in self._texts()]
        return f"<{type(self).__name__}  {'; '.join(parts)}>"

    def _repr_html_(self) -> str:
        """A table without scripts or style sheets; all texts are escaped."""
        rows = "".join(
            f'<tr><th style="{_CELL}">{escape(name)}</th>'
            f'<td style="{_CELL}">{escape(text)}</td></tr>'
            for name, text in self._texts()
        )
        return f"<table><caption><b>{type(self).__name__}</b></caption>{rows}</table>"

    def _texts(self) -> list[tuple[str, str]]:
        return [(n, str(v)) for n, v in self.brief().items() if v not in (None, "", ())]


def megabytes(size: int) -> str:
    """A size in bytes as text; small ones in kB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST else f"{line[:_MOST]}…"
