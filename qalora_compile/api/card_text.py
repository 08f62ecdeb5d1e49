"""Text of model cards: Markdown from foreign words, and a seal that shows edits.

Names come from a model's configuration or from data, so they are escaped: no name can add markup, a
link or a row of the front matter.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qalora_compile.files import write_text
from qalora_compile.progress import say

CARD_FILE = "README.md"
SECOND_FILE = "MODEL_CARD.md"
"""Where the card goes if the folder has a `README.md` that a person wrote."""
_LONGEST = 200
_MARKUP = re.compile(r"([\\`*_{}\[\]#|<>~&@$]|:(?=//)|(?<=www)\.)")
_SEAL = re.compile(r"<!-- written by qalora-compile, sha256 ([0-9a-f]{64}) -->\n?\Z")


def words(value: object) -> str:
    """A foreign text as one line of Markdown without any markup, of at most 200 characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST - 1]}…"
    return _MARKUP.sub(r"\\\1", line)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown; every cell is escaped."""
    lines = [columns, ["---"] * len(columns), *([words(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code(language: str, text: str) -> str:
    """A block of code, which holds no foreign text."""
    return f"```{language}\n{text.strip()}\n```\n"


def front_matter(entries: Mapping[str, str | Sequence[str] | None]) -> str:
    """The YAML at the beginning of a card; texts are quoted as in JSON, and None is left out."""
    lines = []
    for name, value in entries.items():
        if isinstance(value, str):
            lines.append(f"{name}: {json.dumps(value)}")
        elif value:
            lines += [f"{name}:", *(f"- {json.dumps(one)}" for one in value)]
    return "\n".join(["---", *lines, "---", ""])


def sealed(text: str) -> str:
    """The text and, as its last line, the SHA-256 of it."""
    return f"{text}\n<!-- written by qalora-compile, sha256 {_digest(text)} -->\n"


def is_unedited(text: str) -> bool:
    """Whether a card is as it was written; then it may be replaced."""
    found = _SEAL.search(text)
    return found is not None and found[1] == _digest(text[: found.start() - 1])


def put_card(text: str, folder: Path, before: Path) -> str:
    """Write a card into a folder, next to a `README.md` that a person wrote or edited.

    Args:
        text: The card.
        folder: The folder.
        before: The folder that this one replaces, which may be the same, or missing.

    Returns:
        The name of the file.

    Raises:
        OutputError: it cannot be written.
    """
    theirs = _edited(before / CARD_FILE)
    name = CARD_FILE if theirs is None else SECOND_FILE
    if theirs is not None:
        say(
            f"note: {CARD_FILE} was not written by this tool, or was edited: it is kept, and the "
            f"card is {SECOND_FILE}"
        )
        if before != folder:
            (folder / CARD_FILE).write_bytes(theirs)
    write_text(folder / name, sealed(text))
    return name


def _edited(file: Path) -> bytes | None:
    """The content of a card that a person wrote or edited; None if there is none."""
    if not file.is_file():
        return None
    content = file.read_bytes()
    return None if is_unedited(content.decode("utf-8", "replace")) else content


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
