"""The documentation's generated pages are up to date, and its commands and names exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import qalora_compile as qc
from qalora_compile import runtime, testing, training
from scripts import write_commands, write_errors

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
API = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
GENERATED = (write_commands, write_errors)
PLACEHOLDER = "…"


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `qalora-compile` command in the shell blocks of a page."""
    for block in SHELL.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("qalora-compile ") and PLACEHOLDER not in line:
                yield shlex.split(line, comments=True)[1:]


def accepted(words: list[str]) -> bool:
    """Whether the parser of the named command takes the words."""
    parsers = write_commands.parsers()
    if words[0] not in parsers:
        return words[0] in {"--help", "--version"}
    if {"--resume", "--config"} & set(words):  # what is required is then in a file
        known = {name for option in parsers[words[0]]._actions for name in option.option_strings}
        return {word for word in words if word.startswith("--")} <= known
    try:
        parsers[words[0]].parse_args(words[1:])
    except SystemExit as stop:
        return stop.code == 0
    return True


@pytest.mark.parametrize("writer", GENERATED, ids=lambda writer: writer.__name__)
def test_a_generated_page_is_up_to_date(writer: ModuleType) -> None:
    written: Path = writer.PAGE
    assert written.read_text("utf-8") == writer.page(), "run `make docs-pages`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_accepted(page: Path) -> None:
    refused = [words for words in commands(page.read_text("utf-8")) if not accepted(words)]
    assert refused == []


def test_a_wrong_option_is_seen() -> None:
    page = "```bash\nqalora-compile fold run \\\n  --into folded  # not an option\n```\n"
    assert [accepted(words) for words in commands(page)] == [False]
    assert accepted(["fold", "run", "--out", "folded"])
    assert not accepted(["unfold", "run"])


def test_the_api_pages_have_every_public_name() -> None:
    shown = {
        name
        for page in (DOCS / "reference" / "api").glob("*.md")
        for name in API.findall(page.read_text("utf-8"))
    }
    wanted = {
        *(f"qalora_compile.{name}" for name in qc.__all__ if not name.startswith("_")),
        *(f"qalora_compile.training.{name}" for name in training.__all__),
        *(f"qalora_compile.runtime.{name}" for name in runtime.__all__),
        *(f"qalora_compile.testing.{name}" for name in testing.__all__),
    }
    assert wanted - shown == {"qalora_compile.QaloraError"}  # it is on the page of its module


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = set(re.findall(r"- (?:[\w -]+: )?([\w/-]+\.md)$", text, re.MULTILINE))
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    notebooks = {f"notebooks/{page.stem}.md" for page in (DOCS / "notebooks").glob("*.ipynb")}
    project = {f"project/{name}.md" for name in ("contributing", "security", "changelog")}
    assert listed == there | notebooks | project


def test_drawings_have_titles() -> None:
    for drawing in (DOCS / "figures").glob("*.svg"):
        text = drawing.read_text("utf-8")
        assert "<title" in text and "<desc" in text and 'role="img"' in text, drawing.name


def test_notebooks_hold_no_traces_of_a_machine() -> None:
    paths = list((DOCS / "notebooks").glob("*.ipynb"))
    assert len(paths) >= 3
    for path in paths:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        text = json.dumps([output for cell in cells for output in cell.get("outputs", [])])
        found = [trace for trace in ("stderr", "/tmp/", "Traceback") if trace in text]
        assert found == [], f"{path.name}: write its outputs by `make notebooks`"
