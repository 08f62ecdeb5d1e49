"""Run a graph of `torch.export.save` without torch's loader, which runs pickles and expressions.

Only functional operators of ATen are called, by their names, on tensors that the archive holds as
raw bytes. Symbolic sizes are computed by the graph's own nodes, so that no expression is evaluated.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.torch_internals import OpOverload, schema_of
from qalora_compile.untrusted.pt2_file import Pt2File, Pt2Tensor

_TARGET = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
_ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "pow")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_ON_NUMBERS: dict[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name) for name in (*_ARITHMETIC, *_COMPARISONS)
}
_TAKE_TEXT = frozenset({"_assert_async", "_assert_scalar", "div", "div_", "einsum", "gelu", "pad"})
"""The operators that may take a text. Others with one may read or write files (`from_file`)."""
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""Element types by their numbers in torch's schema."""
_FORMATS = {1: torch.contiguous_format, 4: torch.preserve_format}
_STRIDED = 7
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)
"""What reading malformed JSON raises."""
_DROPPED = ("device", "layout", "pin_memory")
"""Arguments that are left to their defaults: everything runs on the CPU, in strided tensors."""


class AtenGraph:
    """The graph of a file, ready to run.

    Args:
        file: The content of the file.

    Raises:
        UserInputError: a node calls something else than a functional operator of ATen, or a tensor
            does not fit its bytes.
    """

    def __init__(self, file: Pt2File) -> None:
        self._file = file
        self._calls = [(node, self._callee(str(node["target"]))) for node in file.graph["nodes"]]
        self._read_last = _last_reads([node for node, _ in self._calls])
        self._stored: dict[str, Tensor] = {}
        self.inputs: list[str | None] = []
        for spec in file.specs["input_specs"]:
            ((kind, row),) = spec.items()
            if kind == "user_input":
                self.inputs.append(row["arg"].get("as_tensor", {}).get("name"))
            elif kind == "constant_input":
                self.inputs.append(None)
            else:
                name = next(row[key] for key in row if key.endswith("_name"))
                self._stored[row["arg"]["name"]] = self._tensor(name)
        self.outputs = [
            spec["user_output"]["arg"].get("as_tensor", {}).get("name")
            for spec in file.specs["output_specs"]
        ]

    def run(self, feed: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
        """The values of the nodes `wanted`, for inputs by the names of their placeholders.

        Raises:
            UserInputError: an operator fails, or a node is malformed.
        """
        values: dict[str, Any] = {**self._stored, **feed}
        kept = {*self._stored, *wanted}
        with torch.no_grad():
            for (node, call), read_last in zip(self._calls, self._read_last, strict=True):
                try:
                    found = self._call(node, call, values)
                    for output, value in zip(node["outputs"], found, strict=True):
                        values.update(_named(output, value))
                except _MALFORMED as error:
                    raise UserInputError(
                        f"a node of {self._file.path.name} is malformed: {str(error)[:200]}",
                        where=str(self._file.path),
                        hint="export the model again",
                    ) from error
                for name in read_last - kept:
                    values.pop(name, None)
        return {name: values[name] for name in wanted if isinstance(values.get(name), Tensor)}

    def _call(
        self, node: Mapping[str, Any], call: Callable[..., Any], values: Mapping[str, Any]
    ) -> Sequence[Any]:
        args, kwargs = [], {}
        for given in node["inputs"]:
            value = _argument(given["arg"], values)
            if given["kind"] == 1:
                args.append(value)
            elif given["name"] not in _DROPPED:
                kwargs[given["name"]] = value
        try:
            found = call(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise UserInputError(
                f"{node['target']} fails: {str(error).splitlines()[0][:200]}",
                where=f"node {node.get('name')} of {self._file.path}",
            ) from error
        if len(node["outputs"]) == 1:
            return (found,)
        return found if isinstance(found, (list, tuple)) else ()

    def _callee(self, target: str) -> Callable[..., Any]:
        if target in _ON_NUMBERS:
            return _ON_NUMBERS[target]
        match = _TARGET.fullmatch(target)
        found = getattr(torch.ops.aten, match[1], None) if match else None
        found = getattr(found, match[2], None) if match and found is not None else None
        if not isinstance(found, OpOverload) or not _is_functional(found):
            raise UserInputError(
                f"{self._file.path.name} calls {target[:80]}, which is no functional operator of "
                "ATen on tensors",
                where=str(self._file.path),
                hint="run it in torch yourself, if you trust the file",
            )
        return found

    def _tensor(self, name: str) -> Tensor:
        row = self._file.tensors.get(name)
        if row is None:
            raise UserInputError(
                f"{self._file.path.name} lacks the tensor {name}", where=str(self._file.path)
            )
        return _read_tensor(row, self._file.bytes_of(row), name, str(self._file.path))


def _last_reads(nodes: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    """For each node, the values that no later node reads."""
    seen: set[str] = set()
    found = []
    for node in reversed(nodes):
        read = set(_names(node["inputs"]))
        found.append(read - seen)
        seen |= read
    return found[::-1]


def _names(value: Any) -> Iterator[str]:
    """All names of values in a part of the JSON; names of arguments among them do no harm."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if key in ("name", "as_name") and isinstance(entry, str):
                yield entry
            else:
                yield from _names(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _names(entry)


def _is_functional(overload: Any) -> bool:
    schema = schema_of(overload)
    name = schema.name.partition("::")[2]
    texts = any(str(a.type) in ("str", "Optional[str]", "List[str]") for a in schema.arguments)
    return not schema.is_mutable and (not texts or name in _TAKE_TEXT)


def _read_tensor(row: Pt2Tensor, raw: bytes, name: str, where: str) -> Tensor:
    meta = row.meta
    dtype = _DTYPES.get(meta["dtype"])
    sizes = [size.get("as_int") for size in meta["sizes"]]
    strides = [stride.get("as_int") for stride in meta["strides"]]
    offset = meta["storage_offset"].get("as_int")
    numbers = [*sizes, *strides, offset]
    fits = (
        dtype is not None
        and meta["layout"] == _STRIDED
        and all(isinstance(n, int) and 0 <= n < 1 << 40 for n in numbers)
        and len(raw) % dtype.itemsize == 0
    )
    if not fits or dtype is None:
        raise UserInputError(f"the tensor {name} is malformed", where=where)
    if not all(sizes):
        return torch.empty(sizes, dtype=dtype)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype)
    last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    if last >= flat.numel():
        raise UserInputError(f"the tensor {name} is beyond its bytes", where=where)
    return flat.as_strided(sizes, strides, offset)


def _named(output: Mapping[str, Any], value: Any) -> dict[str, Any]:
    ((kind, row),) = output.items()
    if kind == "as_tensor":
        return {row["name"]: value}
    if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
        return {row["as_name"]: value} if "as_name" in row else {}
    if kind in ("as_tensors", "as_optional_tensors"):
        rows = [entry.get("as_tensor", entry) for entry in row]
        return {r["name"]: v for r, v in zip(rows, value, strict=True) if "name" in r}
    return {}


def _argument(arg: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    ((kind, row),) = arg.items()
    read = _READERS.get(kind)
    if read is None:
        raise UserInputError(f"an argument of kind {kind[:40]} is not read")
    return read(row, values)


def _entry(entry: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    if "as_none" in entry:
        return None
    name = entry.get("name", entry.get("as_name"))
    if name is not None:
        return values[name]
    if "as_tensor" in entry:
        return values[entry["as_tensor"]["name"]]
    return next(iter(entry.values()))


def _each(rows: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> list[Any]:
    return [_entry(row, values) for row in rows]


_READERS: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    **dict.fromkeys(
        ("as_int", "as_ints", "as_floats", "as_string", "as_bool", "as_bools"), lambda row, _: row
    ),
    "as_float": lambda row, _: float(row),
    **dict.fromkeys(("as_none", "as_device", "as_layout"), lambda row, _: None),
    **dict.fromkeys(("as_tensor", "as_optional_tensor"), _entry),
    **dict.fromkeys(("as_sym_int", "as_sym_bool", "as_sym_float"), _entry),
    **dict.fromkeys(("as_tensors", "as_optional_tensors", "as_sym_ints", "as_sym_bools"), _each),
    "as_scalar_type": lambda row, _: _DTYPES[row],
    "as_memory_format": lambda row, _: _FORMATS[row],
}
"""How arguments of each kind in torch's schema are read."""
