"""docs/reference/extending.md shows code that CI runs, or that stands in the example extension."""

from __future__ import annotations

import re
from pathlib import Path

import qalora_compile.testing as suites
from qalora_compile import extend

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^(<!-- ci: run -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLE = ROOT / "examples" / "extension"


def page() -> str:
    return (ROOT / "docs" / "reference" / "extending.md").read_text("utf-8")


def strange_blocks(text: str, sources: list[str]) -> list[str]:
    """Blocks that nothing runs and that no file of the example holds."""
    return [
        code
        for mark, _, code in BLOCK.findall(text)
        if not mark and not any(code in source for source in sources)
    ]


def example_sources() -> list[str]:
    files = [*EXAMPLE.rglob("*.py"), EXAMPLE / "pyproject.toml"]
    assert len(files) >= 6
    return [file.read_text("utf-8") for file in files]


def test_every_block_is_run_or_taken_from_the_example() -> None:
    assert len(BLOCK.findall(page())) >= 5
    assert strange_blocks(page(), example_sources()) == []


def test_a_strange_block_is_seen() -> None:
    odd = "```python\nprint('from nowhere')\n```\n"
    assert strange_blocks(page() + odd, example_sources()) == ["print('from nowhere')\n"]


def test_the_page_names_what_there_is() -> None:
    for name in re.findall(r"`extend\.(\w+)", page()):
        assert hasattr(extend, name), name
    for name in re.findall(r"`(check_\w+)\(", page()):
        assert hasattr(suites, name), name
