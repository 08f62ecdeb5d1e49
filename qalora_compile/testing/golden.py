"""Comparison of texts with files in the repository: golden graphs."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.errors import UserInputError
from qalora_compile.files import write_text

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program


@dataclass(frozen=True)
class Golden:
    """Compares texts with `<folder>/<name>.txt`; called with a name and a text or a program.

    Attributes:
        folder: The folder of the files.
        update: Write them instead of comparing.
    """

    folder: Path
    update: bool = False

    def __call__(self, name: str, thing: str | Program) -> None:
        """Compare.

        Args:
            name: Name of the file, without `.txt`.
            thing: A text, or a program, whose text is compared (`str(program)`).

        Raises:
            AssertionError: the text differs, which is shown as a diff, or there is no file yet.
            UserInputError: the name leaves the folder.
        """
        __tracebackhide__ = True
        path = self.folder / f"{name}.txt"
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise UserInputError(f"the name {name} leaves the folder", where=str(self.folder))
        text = str(thing)
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
            return
        if not path.exists():
            raise AssertionError(f"{path} is missing: run pytest with --update-golden")
        expected = path.read_text("utf-8")
        if text != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), str(path), "now", lineterm=""
            )
            raise AssertionError(
                "\n".join(["the text is not the golden one:", *lines])
                + "\nif it should be: run pytest with --update-golden, and read the diff"
            )
