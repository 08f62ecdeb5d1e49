"""The dependency direction between rooms, and the size limits of files and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qalora_compile"
CORE = {"errors", "config", "optional", "progress", "files"}
ALLOWED = {
    "ir": {"ir"},
    "quantizers": {"quantizers", "ir"},
    "passes": {"passes", "quantizers", "ir"},
    "exporters": {"exporters", "ir"},
    "capture": {"capture", "ir"},
    "verify": {"verify", "ir"},
    "runtime": {"runtime"},
    "training": {"training", "passes", "ir"},
}
OPTIONAL = {
    "onnx", "onnxruntime", "onnxscript", "onnx_ir", "transformers", "gguf", "peft", "accelerate",
}  # fmt: skip
MAX_LINES, MAX_FUNCTION_LINES = 500, 60

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside the package are absolute"
            yield node, node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room not in ALLOWED and room not in CORE:
        return  # the api and the command line may use every room
    allowed = CORE | ALLOWED.get(room, set())
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node, name in imports(tree):
        if not name.startswith("qalora_compile.") or id(node) in typing_only:
            continue
        assert name.split(".")[1] in allowed, f"{path.name}:{node.lineno} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_libraries_are_imported_inside_functions(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node, name in imports(tree):
        assert id(node) in inner or name.split(".")[0] not in OPTIONAL, f"{path.name}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body
            documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
            first = body[1] if documented and len(body) > 1 else body[0]
            lines = (node.end_lineno or node.lineno) - first.lineno + 1
            # Argument declarations of a command are data: they grow with the options.
            if node.name not in ("add_arguments", "translation_table"):
                assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"
