"""Programs as graphs for a proof, read from `program.json` or from a program in memory."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program_record import read_record, tensor_files
from qalora_compile.untrusted.artifacts import PROGRAM_FILE
from qalora_compile.untrusted.element_types import HALVES
from qalora_compile.verify.proof.graphs.graph import FX, Graph, Node, Ref, SiteRow, Tensor, text_of
from qalora_compile.verify.proof.graphs.operand_names import OPERANDS
from qalora_compile.verify.proof.graphs.stored_tensor import Array, StoredTensor, read_safetensors

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

    from qalora_compile.ir.program import Program

_MODE = {  # the operand that a program in evaluation has as False, or 0
    "aten.dropout.default": ("train", False),
    "aten.dropout_.default": ("train", False),
    "aten.feature_dropout.default": ("train", False),
    "aten.alpha_dropout.default": ("train", False),
    "aten.batch_norm.default": ("training", False),
    "aten.instance_norm.default": ("use_input_stats", False),
    "aten.rrelu.default": ("training", False),
    "aten.scaled_dot_product_attention.default": ("dropout_p", 0.0),
}


def read_program_graph(folder: Path, described: Mapping[str, Any] | None = None) -> Graph:
    """The graph of a program folder, without torch.

    Args:
        folder: The program folder.
        described: Another graph on the tensors of the folder (`describe_program`), for example of
            the same model with a key-value cache.

    Raises:
        UserInputError: the folder is incomplete, malformed or of another version.
    """
    value = read_record(folder)
    tensors: dict[str, StoredTensor] = {}
    for name in tensor_files(folder):
        tensors |= read_safetensors(folder / name)
    try:
        tensors |= {alias: tensors[owner] for alias, owner in value["ties"].items()}
        label = str(folder) if described is None else f"{folder}, as a graph of its own"
        return _assemble(described or value, tensors, {}, label)
    except (KeyError, TypeError, ValueError) as error:
        raise UserInputError(
            f"{PROGRAM_FILE} is malformed: {error!r}", where=str(folder / PROGRAM_FILE)
        ) from error


def describe_program(program: Program) -> dict[str, Any]:
    """A program's graph in the form of `program.json`."""
    from qalora_compile.ir.graph_json import graph_to_json

    return {
        "stage": program.stage,
        "plan": program.plan.to_json(),
        "signature": program.signature.to_json(),
        "graph": graph_to_json(program.graph, program.module),
    }


def program_graph(program: Program) -> Graph:
    """The graph of a program in memory."""
    from qalora_compile.ir.meta import module_path

    value = describe_program(program)
    paths = {node.name: module_path(node) or "" for node in program.graph.nodes}
    tensors = {name: _from_torch(name, tensor) for name, tensor in program.tensors().items()}
    return _assemble(value, tensors, paths, f"program ({program.stage})")


def _from_torch(name: str, tensor: TorchTensor) -> StoredTensor:
    import torch

    from qalora_compile.ir.lazy_tensor import materialize

    def read() -> Array:
        values = materialize(tensor).detach().cpu().contiguous()
        if values.dtype is torch.bfloat16:
            values = values.view(torch.uint16)
        array: Array = values.numpy()
        return array

    return StoredTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), read)


def _assemble(
    value: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    paths: Mapping[str, str],
    label: str,
) -> Graph:
    signature, rows = value["signature"], value["graph"]["nodes"]
    names: dict[str, Any] = {}
    leaves = iter(signature["inputs"])
    nodes: dict[str, Node] = {}
    site_values, outputs, inputs = {}, dict[str, Any](), dict[str, tuple[str, str | None]]()
    for row in rows:
        if row["op"] == "placeholder":
            leaf = next(leaves)
            names[row["name"]] = Ref(row["name"]) if leaf["dtype"] else leaf["value"]
            inputs[row["name"]] = (leaf["name"], leaf["dtype"])
        elif row["op"] == "get_attr":
            stored = row["target"] in tensors
            subgraphs = value["graph"]["subgraphs"]
            names[row["name"]] = Tensor(row["target"]) if stored else str(subgraphs[row["target"]])
        elif row["op"] == "output":
            flat = _flat(_decode(row["args"][0], names))
            outputs = dict(zip(signature["outputs"], flat, strict=True))
        else:
            nodes[row["name"]] = _node(row, names, paths.get(row["name"], ""))
            names[row["name"]] = Ref(row["name"])
            if "site" in row:
                site_values[row["site"]] = row["name"]
    quantized = [row for row in value["plan"] if row["bits"] is not None]
    fields = ("name", "path", "k", "n", "dtype", "experts")
    sites = {row["name"]: SiteRow(**{f: row[f] for f in fields}) for row in quantized}
    half = any(row["dtype"] in HALVES for row in quantized)
    shapes = {leaf["name"]: tuple(leaf["shape"]) for leaf in signature["inputs"]}
    limits = {name: high for name, _, high in signature.get("ranges", ()) if high is not None}
    return Graph(
        *(FX, label, value["stage"], nodes, inputs, outputs, dict(tensors), sites, site_values),
        half=half,
        shapes=shapes,
        most=limits,
    )


def _node(row: Mapping[str, Any], names: Mapping[str, Any], path: str) -> Node:
    args = [_decode(a, names) for a in row["args"]]
    options = {k: _decode(v, names) for k, v in row.get("kwargs", {}).items()}
    op = row["target"]
    if op in _MODE:
        operand, mode = _MODE[op]
        called = OPERANDS[op][: len(args)]
        args = [mode if name == operand else v for name, v in zip_longest(called, args)]
        if operand in options:
            options[operand] = mode
    operands = [text_of(a) for a in args] + [f"{k}={text_of(v)}" for k, v in options.items()]
    line = f"%{row['name']} = {op.removesuffix('.default')}({', '.join(operands)})"
    path = row.get("site", path)
    return Node(row["name"], op, tuple(args), options, line, path=path)


def _decode(value: Any, names: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v, names) for v in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in ("node", "float"):
        return names[content] if kind == "node" else float(content)
    if kind in ("tuple", "slice"):
        return tuple(_decode(v, names) for v in content)
    if kind == "dict":
        return {k: _decode(v, names) for k, v in content.items()}
    return content


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _flat(item)]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _flat(item)]
    return [value]
