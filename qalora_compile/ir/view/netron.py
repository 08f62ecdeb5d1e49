"""The graph of a program as an ONNX model without weights, for viewers such as Netron.

It cannot be run, and is not what `export` writes. Its nodes are the program's own operators, each
in the domain of its namespace (`qalora`, `aten`), at any stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qalora_compile._version import __version__
from qalora_compile.files import atomic_files
from qalora_compile.ir.program import Program
from qalora_compile.ir.view.outline import INPUT, OUTPUT, Box, Value, outline
from qalora_compile.optional import require
from qalora_compile.untrusted.element_types import ELEMENT_TYPES

_PURPOSE = "write a graph for Netron"
_TYPES = {kind.name: kind.onnx for kind in ELEMENT_TYPES if kind.onnx}
_IR_VERSION, _OPSET = 10, 21


def structure_model(program: Program, only: str | None = None) -> Any:
    """An `onnx.ModelProto` that passes `onnx.checker`, with the shape of every value.

    A node has the operator's name, the site or module path as its name, its stored tensors as
    attributes (`scale = "q.scale: float32[48, 2]"`) and its options as attributes.

    Args:
        program: At any stage.
        only: A site or module path, to show this part alone.

    Raises:
        UserInputError: nothing is at or below `only`.
        UnsupportedError: onnx is not installed.
    """
    helper = require("onnx", extra="onnx", purpose=_PURPOSE).helper
    boxes = outline(program, only)
    inputs = [_typed(box.value) for box in boxes if box.domain == INPUT]
    used: dict[str, int] = {}
    nodes = [_node(box, used) for box in boxes if box.domain not in (INPUT, OUTPUT)]
    results = [box for box in boxes if box.domain == OUTPUT]
    outputs = []
    for box in results:  # an Identity, so that outputs keep their names and may be inputs too
        name = f"output {box.op}"
        nodes.append(helper.make_node("Identity", list(box.reads), [name], name=name))
        outputs.append(_typed(Value(name, box.value.dtype, box.value.shape)))
    known = [_typed(box.value) for box in boxes if box.domain not in (INPUT, OUTPUT)]
    graph = helper.make_graph(nodes, f"program_{program.stage}", inputs, outputs, value_info=known)
    domains = sorted({node.domain for node in nodes if node.domain})
    opsets = [helper.make_opsetid("", _OPSET), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(
        graph,
        opset_imports=opsets,
        producer_name="qalora-compile",
        producer_version=__version__,
        ir_version=_IR_VERSION,
    )
    model.doc_string = f"The structure of a program at stage {program.stage}; it has no weights."
    return model


def write_structure(
    program: Program, path: str | Path, only: str | None = None, *, overwrite: bool = False
) -> None:
    """Write `structure_model` as a file.

    Raises:
        UserInputError: the file exists and `overwrite` is false; or see `structure_model`.
    """
    onnx = require("onnx", extra="onnx", purpose=_PURPOSE)
    model = structure_model(program, only)
    with atomic_files(Path(path), overwrite=overwrite) as scratch:
        onnx.save(model, str(scratch))


def _node(box: Box, used: dict[str, int]) -> Any:
    """A node; further nodes of one path get a number."""
    helper = require("onnx", extra="onnx", purpose=_PURPOSE).helper
    name = f"{box.path or box.value.name}/{box.op}"
    used[name] = used.get(name, 0) + 1
    if used[name] > 1:
        name = f"{name}@{used[name]}"
    node = helper.make_node(box.op, list(box.reads), [box.value.name], name=name, domain=box.domain)
    for key, text in (*box.stored, *box.options):
        node.attribute.append(helper.make_attribute(key, text))
    return node


def _typed(value: Value) -> Any:
    """A value with its type; numbers, such as sizes, are scalars."""
    onnx = require("onnx", extra="onnx", purpose=_PURPOSE)
    kind = _TYPES[value.dtype or "int64"]
    return onnx.helper.make_tensor_value_info(value.name, kind, list(value.shape))
