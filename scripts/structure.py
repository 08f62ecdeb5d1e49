"""Print the figures of the package's structure, and check them against their limits.

    python -m scripts.structure            # the table; exit status 1 where a limit is broken
    python -m scripts.structure --circles  # the modules of each import circle

An arrow is an import between two files of one folder, or between a file and a subfolder, or between
two subfolders, counted once. Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NAME = "qalora_compile"
ROOT = Path(__file__).parents[1]
RAW_ARGS = re.compile(r"\bargs\[")
VIEWS = "ir/ops/"
"""Files that may access arguments by position: those next to the operators' schemas."""
IMPORTING_CALLS = {"import_module", "__import__"}

Edges = dict[str, set[str]]


@dataclass(frozen=True)
class Limit:
    """One figure and its limit.

    Attributes:
        title: What is counted.
        count: Computes the figure.
        before: Its value at the commit before the package was restructured.
        most: The largest value allowed.
    """

    title: str
    count: Callable[[Path], float]
    before: float
    most: float


@cache
def sources(package: Path) -> dict[str, str]:
    """Module name → source text, of every file of the package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text("utf-8")
    return found


def imported(node: ast.AST, modules: Mapping[str, str]) -> Iterator[str]:
    """The modules of the package that a syntax node imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in modules else node.module or "" for name in inner]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORTING_CALLS:
        names = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
    else:
        return
    yield from (name for name in names if name in modules)


@cache
def import_graph(package: Path) -> Edges:
    """Module → the other modules that it imports anywhere in its text."""
    modules = sources(package)
    return {
        name: {to for node in ast.walk(ast.parse(text)) for to in imported(node, modules)} - {name}
        for name, text in modules.items()
    }


def circles(edges: Edges) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for to in sorted(edges[name]):
            if to not in order:
                visit(to)
                low[name] = min(low[name], low[to])
            elif to in stack:
                low[name] = min(low[name], order[to])
        if low[name] == order[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in sorted(edges):
        if name not in order:
            visit(name)
    return found


def arrows(room: str) -> Callable[[Path], float]:
    """Count the arrows between the files and subfolders directly in a folder of the package."""

    def count(package: Path) -> float:
        prefix = f"{NAME}.{room}."
        pairs = set()
        for name, targets in import_graph(package).items():
            for to in targets:
                if name.startswith(prefix) and to.startswith(prefix):
                    ends = [each.removeprefix(prefix).split(".")[0] for each in (name, to)]
                    pairs |= {tuple(ends)} if ends[0] != ends[1] else set()
        return len(pairs)

    return count


def raw_args(package: Path) -> float:
    """Number of accesses to a node's arguments by position, outside the views of operators."""
    files = [p for p in package.rglob("*.py") if VIEWS not in p.as_posix()]
    return sum(len(RAW_ARGS.findall(path.read_text("utf-8"))) for path in files)


def function_lengths(package: Path) -> list[int]:
    """Lines of each function, without decorators."""
    return [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for text in sources(package).values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def file_lengths(package: Path) -> list[int]:
    """Lines of each file."""
    return [len(text.splitlines()) for text in sources(package).values()]


LIMITS = (
    Limit("import circles", lambda p: len(circles(import_graph(p))), 3, 0),
    Limit("arrows inside verify", arrows("verify"), 134, 20),
    Limit("arrows inside passes", arrows("passes"), 81, 28),
    Limit("arrows inside training", arrows("training"), 56, 23),
    Limit("arguments of nodes by position", raw_args, 285, 0),
    Limit("lines of the package", lambda p: sum(file_lengths(p)), 48053, 77_000),
    Limit("median function", lambda p: statistics.median(function_lengths(p)), 9, 9),
    Limit("longest function", lambda p: max(function_lengths(p)), 60, 60),
    Limit("longest file", lambda p: max(file_lengths(p)), 499, 400),
)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns 1 if a figure is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--package", type=Path, default=ROOT / NAME)
    parser.add_argument("--circles", action="store_true", help="list the modules of each circle")
    options = parser.parse_args(arguments)
    if options.circles:
        for circle in circles(import_graph(options.package)):
            print(f"{len(circle)}: {', '.join(circle)}")
    print(f"{'figure':34} {'before':>8} {'now':>8} {'limit':>8}")
    over = 0
    for limit in LIMITS:
        now = limit.count(options.package)
        over += now > limit.most
        mark = "  over the limit" if now > limit.most else ""
        print(f"{limit.title:34} {limit.before:8g} {now:8g} {limit.most:8g}{mark}")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
