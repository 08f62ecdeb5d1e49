"""The dependency direction between folders, lazy optional libraries, sizes of files and functions.

Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qalora_compile"
ROOT_NAME = "qalora_compile"
CLI = f"{ROOT_NAME}.cli"
CORE = {
    *("errors", "config", "registry", "optional", "progress", "files", "untrusted", "sealed"),
    *("_version", "verdict", "brief"),
}
ALLOWED = {
    **dict.fromkeys(CORE, CORE),
    "ir": CORE | {"ir"},
    "quantizers": CORE | {"quantizers", "ir"},
    "passes": CORE | {"passes", "quantizers", "ir"},
    "exporters": CORE | {"exporters", "ir"},
    "capture": CORE | {"capture", "ir"},
    "verify": CORE | {"verify", "ir", "pages"},
    "runtime": {"runtime", "errors", "optional", "untrusted", "_version"},
    "serving": CORE | {"serving", "runtime"},
    "pages": {"pages", "errors", "files", "optional"},
    "training": CORE | {"training", "passes", "quantizers", "pages", "ir"},
    "extend": CORE | {"ir", "passes", "quantizers", "exporters", "capture"},
    "testing": CORE
    | {"testing", "api", "verify", "passes", "quantizers", "exporters", "capture", "ir"},
    "eager": CORE | {"eager", "verify", "ir"},
}
"""What each room may import of this package."""
FREE = {"__init__", "__main__", "api", "cli"}
"""Rooms that join the others: they may import everything."""
OPTIONAL = {
    "onnx", "onnxruntime", "onnxscript", "onnx_ir", "transformers", "gguf", "peft", "accelerate",
    "grandalf", "jinja2", "matplotlib", "re2", "openvino", "openvino_tokenizers", "coremltools",
    "fastapi", "uvicorn", "starlette", "lm_eval",
}  # fmt: skip
IMPORTING_CALLS = {"import_module", "require", "__import__"}
MAX_LINES, MAX_FUNCTION_LINES = 400, 60

FILES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Found:
    """One module name that a file imports, and where."""

    name: str
    line: int
    lazy: bool
    typing_only: bool


def nodes_inside(tree: ast.AST, kinds: type[ast.AST] | tuple[type[ast.AST], ...]) -> set[int]:
    """Ids of all nodes below nodes of the given kinds."""
    outer = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return {id(inner) for node in outer for inner in ast.walk(node) if inner is not node}


def names_imported(node: ast.AST) -> list[str]:
    """The modules that one node imports; `from package import x` may mean the module package.x."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports inside the package are absolute"
        if node.module == ROOT_NAME:
            return [f"{ROOT_NAME}.{alias.name}" for alias in node.names]
        return [node.module or ""]
    if isinstance(node, ast.Call) and node.args:
        called = ast.unparse(node.func).rpartition(".")[2]
        argument = node.args[0]
        if isinstance(argument, ast.JoinedStr) and argument.values:
            argument = argument.values[0]
        if called in IMPORTING_CALLS and isinstance(argument, ast.Constant):
            return [str(argument.value)]
    return []


@cache
def imports(source: str) -> tuple[Found, ...]:
    """Every import of a file: statements, and calls that import by a literal name."""
    tree = ast.parse(source)
    functions = nodes_inside(tree, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typing = {
        id(inner)
        for block in blocks
        if ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in block.body
        for inner in ast.walk(statement)
    }
    return tuple(
        Found(name, getattr(node, "lineno", 0), id(node) in functions, id(node) in typing)
        for node in ast.walk(tree)
        for name in names_imported(node)
    )


def wrong_direction(room: str, source: str) -> list[str]:
    """Imports that a room must not make."""
    assert room in ALLOWED or room in FREE, f"the room {room} needs a row in ALLOWED"
    if room in FREE:
        return []
    return [
        f"line {found.line}: {room} imports {found.name}"
        for found in imports(source)
        if found.name.split(".")[0] == ROOT_NAME
        and [*found.name.split("."), ""][1] not in ALLOWED[room]
    ]


def eager_optional(source: str) -> list[str]:
    """Optional libraries that importing the file would import."""
    return [
        f"line {found.line}: {found.name}"
        for found in imports(source)
        if found.name.split(".")[0] in OPTIONAL and not (found.lazy or found.typing_only)
    ]


def too_long(source: str) -> list[str]:
    """The file, or functions in it, past their limit; docstrings count."""
    lines = len(source.splitlines())
    long = [f"the file has {lines} lines"] if lines > MAX_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                long.append(f"{node.name} has {length} lines")
    return long


def faults(check: Callable[[Path, str], list[str]]) -> dict[str, list[str]]:
    """File → what a check finds wrong in it."""
    found = {str(p.relative_to(PACKAGE)): check(p, p.read_text("utf-8")) for p in FILES}
    return {name: wrong for name, wrong in found.items() if wrong}


def room_of(path: Path) -> str:
    """The folder or file directly in the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_a_room_imports_only_what_it_may() -> None:
    assert faults(lambda path, source: wrong_direction(room_of(path), source)) == {}


def test_optional_libraries_are_imported_inside_functions() -> None:
    assert faults(lambda _, source: eager_optional(source)) == {}


def test_files_and_functions_stay_small() -> None:
    assert faults(lambda _, source: too_long(source)) == {}


def test_every_room_of_the_contract_exists() -> None:
    rooms = set(map(room_of, FILES))
    assert rooms == set(ALLOWED) | FREE


def takes_options(path: Path, source: str) -> list[str]:
    """What a file outside `cli` imports of the command line."""
    if room_of(path) in ("cli", "__main__"):
        return []
    names = [found.name for found in imports(source)]
    return [name for name in names if name == "argparse" or name.startswith(CLI)]


def test_options_of_the_command_line_end_in_cli() -> None:
    assert faults(takes_options) == {}


# Planted faults: each check must be able to fail.


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("exporters", "from qalora_compile.passes.framework.base import Pass"),
        ("exporters", "from qalora_compile import passes"),
        ("exporters", "from qalora_compile import Pipeline"),
        ("exporters", "import qalora_compile.passes.framework.base"),
        ("verify", "import qalora_compile as qc"),
        ("ir", "def f():\n    from qalora_compile.passes import base"),
        ("ir", "import importlib\nimportlib.import_module('qalora_compile.passes')"),
        ("ir", "def f(n):\n    return import_module(f'qalora_compile.passes.{n}')"),
        ("runtime", "from qalora_compile.ir.program import Program"),
        ("runtime", "from qalora_compile.files import write_json"),
        ("pages", "from qalora_compile.ir.program import Program"),
        ("errors", "from qalora_compile.ir.site_plan import Site"),
        ("capture", "from qalora_compile.verify import Report"),
        ("ir", "if TYPE_CHECKING:\n    pass\nelse:\n    from qalora_compile.passes import Pass"),
        ("errors", "if TYPE_CHECKING:\n    from qalora_compile.verify.compare import Report"),
        ("exporters", "from qalora_compile import __version__"),
    ],
)
def test_a_wrong_import_is_caught(room: str, source: str) -> None:
    assert len(wrong_direction(room, source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("passes", "from qalora_compile.quantizers import get_quantizer"),
        ("exporters", "from qalora_compile._version import __version__"),
        ("cli", "from qalora_compile.passes import Pipeline"),
        ("ir", "import torch\nfrom qalora_compile_other import x"),
    ],
)
def test_a_right_import_passes(room: str, source: str) -> None:
    assert wrong_direction(room, source) == []


def test_an_unknown_room_and_a_relative_import_are_caught() -> None:
    with pytest.raises(AssertionError, match="needs a row"):
        wrong_direction("helpers", "")
    with pytest.raises(AssertionError, match="absolute"):
        wrong_direction("ir", "from . import plan")


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("import onnx", 1),
        ("from onnxruntime.capi import x", 1),
        ("try:\n    import gguf\nexcept ImportError:\n    gguf = None", 1),
        ("class A:\n    import peft", 1),
        ("ort = require('onnxruntime', extra='onnx', purpose='run')", 1),
        ("def f():\n    import onnx", 0),
        ("def f():\n    return require('onnx', extra='onnx', purpose='write')", 0),
        ("if TYPE_CHECKING:\n    import transformers", 0),
        ("import onnx_something_else", 0),
    ],
)
def test_an_eager_optional_import_is_caught(source: str, faults: int) -> None:
    assert len(eager_optional(source)) == faults


def test_long_files_and_functions_are_caught() -> None:
    body = "    x = 1\n"
    assert too_long("def f():\n" + body * 59) == []
    assert too_long("def f():\n" + body * 60) == ["f has 61 lines"]
    assert too_long("class A:\n    async def g():\n" + "    " + body + "        x = 1\n" * 60) == [
        "g has 62 lines"
    ]
    assert too_long("x = 1\n" * 400) == []
    assert too_long("x = 1\n" * 401) == ["the file has 401 lines"]
