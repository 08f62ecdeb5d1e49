"""The documentation names only files, modules, attributes and headings that exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qalora_compile"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
HOMES = (ROOT, PACKAGE, ROOT / "docs")
"""Where the pages' paths begin."""
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?(?:\.(?:py|cc|h|md|toml|sh)|/)")
MADE = re.compile(
    r"(?:edge|run|first|folded|models|found|golden|model|tensorboard|tokenizer|adapter|checkpoints|build)/"
    r"|qalora_compile/a/|tests/a/"
)
"""Paths in the folders that commands write, and placeholders."""
DOTTED = re.compile(r"\bqalora_compile(?:\.\w+)+")
FOLDERS = "|".join(sorted(path.stem for path in PACKAGE.iterdir() if path.stem[0] not in "_."))
INSIDE = re.compile(rf"(?:{FOLDERS})(?:\.(?!py\b|json\b)\w+)+(?![\w.])")
"""A name that a page gives without the package's own."""
GROUPS = {f"qalora_compile.{kind}" for kind in ("passes", "quantizers", "targets", "readers")}
"""Entry-point groups, which are named like modules."""
IMPORTED = re.compile(r"^ *from (qalora_compile[\w.]*) import (?:\(([^)]+)\)|(.+)$)", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")

every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)


def spans(text: str) -> list[str]:
    """What stands in backticks, code blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.M))


def reach(found: object, part: str) -> object:
    """An attribute or a submodule.

    Raises:
        ImportError: there is neither.
    """
    if hasattr(found, part):
        return getattr(found, part)
    return importlib.import_module(f"{getattr(found, '__name__', '')}.{part}")


def resolves(name: str) -> bool:
    """Whether a dotted name can be imported, or reached by attributes."""
    module, *rest = name.split(".")
    try:
        found: object = importlib.import_module(module)
        for part in rest:
            found = reach(found, part)
    except ImportError:
        return False
    return True


def anchor(heading: str) -> str:
    """The fragment that a heading gets."""
    plain = re.sub(r"[^\w\s-]", "", heading.lower())
    return plain.strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """The fragments of a page."""
    return {anchor(h) for h in re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)}


@every_page
def test_paths_exist(page: Path) -> None:
    named = [s for s in spans(page.read_text("utf-8")) if PATH.fullmatch(s) and "/" in s]
    missing = [
        name
        for name in named
        if not MADE.match(name) and not any((home / name).exists() for home in HOMES)
    ]
    assert missing == []


@every_page
def test_tests_exist(page: Path) -> None:
    for path, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text("utf-8")):
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert test in names, path


@every_page
def test_names_resolve(page: Path) -> None:
    text = re.sub(r"\bqc\.", "qalora_compile.", page.read_text("utf-8"))
    names = set(DOTTED.findall(text))
    names |= {f"qalora_compile.{m[0]}" for span in spans(text) if (m := INSIDE.match(span))}
    for module, *imported in IMPORTED.findall(text):
        names |= {f"{module}.{name}" for name in re.findall(r"\w+", "".join(imported))}
    assert [name for name in sorted(names - GROUPS) if not resolves(name)] == []


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, fragment in LINK.findall(page.read_text("utf-8")):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        if fragment:
            assert fragment in anchors(linked), f"{target}#{fragment}"


def test_wrong_names_are_found() -> None:
    assert not resolves("qalora_compile.verify.compare_graphs")
    assert not resolves("qalora_compile.ir.deferred")
    assert resolves("qalora_compile.ir.ops.linear") and resolves("qalora_compile.QuantSpec")
    assert PATH.fullmatch("ir/lazy_tensor.py") and not PATH.fullmatch("verify A B")
