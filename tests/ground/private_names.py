"""Private names of torch and transformers that a source file uses, found in its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from qalora_compile.ir.torch_internals import TorchDispatchMode

LIBRARIES = {"torch", "transformers", "peft", "datasets", "accelerate"}
PRIVATE_MODULES = {"torch.fx.experimental"}
"""Private by what their documentation says, though not by their names."""
UNDOCUMENTED = {
    "ALL_ATTENTION_FUNCTIONS",
    "DynamicLayer",
    "ROPE_INIT_FUNCTIONS",
    "TENSOR_PROCESSORS",
    "TensorProcessor",
    "all_tied_weights_keys",
    "get_expanded_tied_weights_keys",
    "get_gguf_hf_weights_map",
    "is_initialized",
    "lazy_initialization",
    "modeling_gguf_pytorch_utils",
    "rope_type",
}
"""Names of transformers without an underscore that its documentation does not promise."""
ENVIRONMENT = {"HF_DEACTIVATE_ASYNC_LOAD"}
"""Variables of the environment that its documentation does not promise either."""
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}
"""Public in Python, in spite of the underscore."""
OTHERS = {"argparse"}
"""Imported modules that are another seam's affair."""
_TORCH = ("torch", "qalora_compile.ir.torch_internals")
BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}


def _torch_attributes() -> set[str]:
    """Private names of the classes of torch that this project derives from."""
    module = fx.GraphModule({}, fx.Graph())
    things = (module, fx.Interpreter(module), TorchDispatchMode)
    return {name for thing in things for name in dir(thing) if is_private(name)}


def is_private(name: str) -> bool:
    """Whether a name begins with an underscore, and is none that Python itself defines."""
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


TORCH_ATTRIBUTES = _torch_attributes()


@dataclass(frozen=True)
class Use:
    """A private name and the line that uses it; `name` is as long as the source shows it."""

    line: int
    name: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.name}"


class Cases(dict[str, Callable[[], None]]):
    """A check for each private name of a seam, by the full name."""

    def __call__(self, name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """Register the decorated function as the check of a name."""

        def register(check: Callable[[], None]) -> Callable[[], None]:
            assert name not in self, f"{name} has two cases"
            self[name] = check
            return check

        return register

    def without_case(self, seam: Path) -> list[str]:
        """Private names in a seam that have no case."""
        found = {use.name for use in private_names(seam.read_text("utf-8"))}
        return sorted(use for use in found if not any(_is_of(use, name) for name in self))

    def without_use(self, seam: Path) -> list[str]:
        """Names with a case that the seam does not use."""
        found = {use.name for use in private_names(seam.read_text("utf-8"))}
        return sorted(name for name in self if not any(_is_of(use, name) for use in found))


def _is_of(use: str, name: str) -> bool:
    """Whether a use, of which the source may show the last part alone, is of a private name."""
    return f"{name}.".startswith(f"{use}.") or name.rpartition(".")[2] == use.rpartition(".")[2]


def private_names(source: str) -> list[Use]:
    """Every use of a private name of a library, in the order of the lines.

    Names are looked for in imports, in attributes (also of objects whose type the source does not
    show, unless the file itself defines the name), in `getattr` and the like with a literal, and in
    what a class derived from one of the library overrides.
    """
    return sorted(_Scan(source).uses(), key=lambda use: (use.line, use.name))


class _Scan:
    """One source file."""

    def __init__(self, source: str) -> None:
        self._nodes = list(ast.walk(ast.parse(source)))
        self._imported = dict(_imports(self._nodes))
        self._own = _defined(self._nodes)

    def uses(self) -> Iterator[Use]:
        """All private names."""
        inner = {id(n.value) for n in self._nodes if isinstance(n, ast.Attribute)}
        for node in self._nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for name in _modules(node):
                    if name.split(".")[0] in LIBRARIES and _is_internal(name):
                        yield Use(node.lineno, name)
            elif isinstance(node, ast.Attribute) and id(node) not in inner:
                yield from self._attributes(node)
            elif isinstance(node, ast.Call):
                yield from self._texts(node)
            elif isinstance(node, ast.Constant) and node.value in ENVIRONMENT:
                yield Use(node.lineno, str(node.value))
            elif isinstance(node, ast.ClassDef):
                yield from self._overrides(node)

    def _attributes(self, node: ast.Attribute) -> Iterator[Use]:
        """The private names of one chain such as `graph._codegen.pytree_info`."""
        names: list[str] = []
        base: ast.expr = node
        while isinstance(base, ast.Attribute):
            names.insert(0, base.attr)
            base = base.value
        root = base.id if isinstance(base, ast.Name) else ""
        known = self._imported.get(root, "")
        library = known.split(".")[0]
        if root in ("self", "cls") and names[0] not in UNDOCUMENTED:
            names = names[1:]
        if library in OTHERS or library == "qalora_compile":
            return
        for place, name in enumerate(names):
            if name in UNDOCUMENTED or (is_private(name) and name not in self._own):
                shown = known or (root if library else "?")
                yield Use(node.lineno, ".".join([shown, *names[: place + 1]]))

    def _texts(self, node: ast.Call) -> Iterator[Use]:
        """`getattr(model, "_name")`, `require("library.module")`."""
        called = ast.unparse(node.func).rpartition(".")[2]
        texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
        for text in texts:
            if not isinstance(text, str):
                continue
            if called in BY_NAME and (is_private(text) or text in UNDOCUMENTED):
                yield Use(node.lineno, f"?.{text}")
            elif text.split(".")[0] in LIBRARIES and _is_internal(text):
                yield Use(node.lineno, text)

    def _overrides(self, node: ast.ClassDef) -> Iterator[Use]:
        """Private names of torch's classes that a class derived from one of them has too."""
        bases = {ast.unparse(base).split(".")[0] for base in node.bases}
        if not any(self._imported.get(base, "").startswith(_TORCH) for base in bases):
            return
        for inner in ast.walk(node):
            name = _own_name(inner)
            if name in TORCH_ATTRIBUTES:
                yield Use(getattr(inner, "lineno", 0), f"{node.name}.{name}")


def _own_name(node: ast.AST) -> str:
    """The name of a method, or of an attribute of `self`; empty for all else."""
    if isinstance(node, ast.FunctionDef):
        return node.name
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "self" else ""
    return ""


def _is_internal(name: str) -> bool:
    """Whether a dotted name has a private or an undocumented part."""
    parts = name.split(".")
    inside = any(name == module or name.startswith(f"{module}.") for module in PRIVATE_MODULES)
    return inside or any(is_private(part) or part in UNDOCUMENTED for part in parts)


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Dotted names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _imports(nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
    """Name in the file → what it stands for."""
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias, full in zip(node.names, _modules(node), strict=True):
                top = full.split(".")[0] if isinstance(node, ast.Import) else full
                yield (alias.asname, full) if alias.asname else (top.split(".")[-1], top)


def _defined(nodes: list[ast.AST]) -> set[str]:
    """Private names that a file defines itself: functions, and attributes of `self` or a class."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found
