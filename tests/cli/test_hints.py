"""A hint names options that the command which prints it has, or the command that has them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import qalora_compile
from qalora_compile.cli.commands import COMMANDS
from qalora_compile.cli.parser import build_parser

ROOT = Path(qalora_compile.__file__).parent
DOORS = ("cli", "api")
"""Rooms whose files belong to the commands that import them."""
OPTION = re.compile(r"--[a-z][a-z-]*[a-z]")
EVERYWHERE = {"--out", "--overwrite"}
"""What every command that writes a folder has; `files` is about their outputs."""


def text_of(node: ast.AST) -> str:
    """The literal parts of a string, in order."""
    constants = (each.value for each in ast.walk(node) if isinstance(each, ast.Constant))
    return " ".join(value for value in constants if isinstance(value, str))


def hints() -> Iterator[tuple[Path, int, str]]:
    """Every hint of the package that names an option: file, line, text."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "hint":
                text = text_of(node.value)
                if OPTION.search(text):
                    yield path.relative_to(ROOT), node.value.lineno, text


@cache
def options_of(command: str) -> frozenset[str]:
    parser = build_parser([command])
    (commands,) = (a for a in parser._actions if a.dest == "command")
    assert commands.choices is not None
    chosen = dict(commands.choices)[command]
    return frozenset(name for action in chosen._actions for name in action.option_strings)


@cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of `DOORS`, such as `cli.ui`, that one of them imports, itself among them."""
    found = {module}
    path = ROOT / f"{module.replace('.', '/')}.py"
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            name = (node.module or "").removeprefix("qalora_compile.")
            if name.partition(".")[0] in DOORS and (ROOT / f"{name.replace('.', '/')}.py").exists():
                found |= imports_of(name)
    return frozenset(found)


def printed_by(path: Path) -> list[str]:
    """Commands that print the hints of a file: one, or those that share a module."""
    if path.parts[0] not in DOORS:
        return list(COMMANDS)
    if path.parts[0] == "cli" and path.stem in COMMANDS:
        return [path.stem]
    module = ".".join(path.with_suffix("").parts)
    found = [command for command in COMMANDS if module in imports_of(f"cli.{command}")]
    return found or list(COMMANDS)  # what Python users call, and no command


def unknown(path: Path, text: str) -> list[str]:
    """Options that neither a command named in a hint has, nor every command that prints it."""
    named = {command for command in COMMANDS if re.search(rf"\b{command}\b", text)}
    known = frozenset().union(*(options_of(command) for command in named))
    shared = frozenset.intersection(*(options_of(command) for command in printed_by(path)))
    return sorted(set(OPTION.findall(text)) - known - shared - EVERYWHERE)


@pytest.mark.parametrize(
    ("path", "line", "text"), [pytest.param(*h, id=f"{h[0]}:{h[1]}") for h in hints()]
)
def test_a_hint_names_options_that_there_are(path: Path, line: int, text: str) -> None:
    assert unknown(path, text) == [], f"{path}:{line}: name the command that has it: {text!r}"


def test_the_walk_sees_what_it_looks_for() -> None:
    found = {path for path, _, _ in hints()}
    assert {Path("capture/causal_lm.py"), Path("api/deploy.py")} <= found, "one in each room"
    assert unknown(Path("capture/causal_lm.py"), "export it without one: --no-kv-cachet")
    assert unknown(Path("capture/causal_lm.py"), "leave it out: --no-kv-cache")
    assert not unknown(Path("capture/causal_lm.py"), "export --no-kv-cache leaves it out")
    assert unknown(Path("cli/fold.py"), "use --target ort")
    assert not unknown(Path("cli/export.py"), "use --target ort")
