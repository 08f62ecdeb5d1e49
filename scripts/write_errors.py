"""Write docs/reference/errors.md: the errors of the package by their text, with their remedies.

The source is the package's own code: every error that it makes with its text in place. A test
compares the page with it.

    python -m scripts.write_errors
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qalora_compile.files import write_text

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qalora_compile"
PAGE = ROOT / "docs" / "reference" / "errors.md"
KINDS = (
    *("QaloraError", "UserInputError", "OutputError", "CaptureError", "UnsupportedError"),
    *("PassError", "PreconditionError", "ExtensionError", "VerificationError"),
)
"""Errors that a user can cause; the others are faults of the package."""
AREAS = {
    "cli": "Command line",
    "config": "Options",
    "capture": "Loading and capturing a model",
    "training": "Data and training",
    "quantizers": "Quantization and calibration",
    "passes": "Passes and pipelines",
    "eager": "The model's own modules",
    "ir": "Programs",
    "exporters": "Export",
    "runtime": "Running an exported model",
    "verify": "Verification",
    "untrusted": "Files from strangers",
    "testing": "Tests and contract suites",
    "api": "Folders and steps",
}
REST = "Everything else"
INTRODUCTION = """# Errors and their remedies

This page lists what the package says when something is wrong, and what to do. Search it for a few
words of your message: `…` stands for names and numbers. `python -m scripts.write_errors` writes it
from the code; do not edit it by hand.

Every error says what is wrong, where, and what to do:

```
error: the run was started with --lr 0.01, not 0.02
  where: run
  do:    give the options of the first call, or start a new run
```

In Python, all of them are `qalora_compile.QaloraError`; the last column names the subclass in
`qalora_compile.errors`. A command ends with exit code 2, and with 1 where a check failed. Where the
second column is empty, the message itself says what was expected. A message that begins with
*internal error*, and a `PostconditionError`, are faults of this package: please report them.
"""


@dataclass(frozen=True, order=True)
class Message:
    """One error in the code."""

    area: str
    text: str
    remedy: str
    kind: str


def text_of(node: ast.expr | None) -> str:
    """The text that an expression gives, with `…` for what is only known when it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    if isinstance(node, ast.IfExp):
        found = [text_of(node.body), text_of(node.orelse)]
        return "; or: ".join(text for text in found if text)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "" if node is None else "…"


def errors_in(path: Path) -> Iterator[Message]:
    """The errors that a file makes."""
    parts = path.relative_to(PACKAGE).parts
    area = AREAS.get(parts[0], REST) if len(parts) > 1 else REST
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        text = text_of(node.args[0]) if node.args else ""
        if node.func.id in KINDS and re.search(r"\w{3}", text):
            hint = {word.arg: word.value for word in node.keywords}.get("hint")
            yield Message(area, text, text_of(hint), node.func.id)


def messages() -> list[Message]:
    """All of them, each once, by area and text."""
    found = {message for path in PACKAGE.rglob("*.py") for message in errors_in(path)}
    return sorted(found)


def cell(text: str) -> str:
    """Text as it has to stand in a cell of a table."""
    plain = re.sub(r"…(?:\s*…)+", "…", " ".join(text.split()))
    return "" if plain == "…" else re.sub(r"([\\`*|<>\[\]])", r"\\\1", plain)


def page() -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    every = messages()
    for area in [*AREAS.values(), REST]:
        parts.append(f"\n## {area}\n\n| message | what to do | |\n|---|---|---|\n")
        parts += [
            f"| {cell(m.text)} | {cell(m.remedy)} | `{m.kind}` |\n" for m in every if m.area == area
        ]
    return "".join(parts)


def main() -> None:
    """Write the page."""
    write_text(PAGE, page())
    print(f"{PAGE.relative_to(ROOT)}: {len(messages())} messages")


if __name__ == "__main__":
    main()
