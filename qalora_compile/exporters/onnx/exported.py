"""A lowered program as an `ExportedProgram` for torch.onnx: unchanged, or traced and decomposed.

After the passes, almost every operator of a graph has a translation to ONNX. Such a graph needs
neither a second trace by `torch.export` nor the three traces of `run_decompositions`. Together they
take longer than everything else between capture and file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from qalora_compile.ir.ops.views import output_value
from qalora_compile.ir.out_of_place import write_out_of_place
from qalora_compile.ir.program import Program
from qalora_compile.ir.shape_propagation import propagate, without_assertions
from qalora_compile.ir.signature import argument_names, input_spec
from qalora_compile.ir.torch_internals import (
    HigherOrderOperator,
    OpOverload,
    is_composed,
    pytree,
    schema_of,
)

_ATEN = torch.ops.aten
_COMPOSED = frozenset(
    {
        *(_ATEN.__and__.Tensor, _ATEN.__or__.Tensor, _ATEN.where.Scalar, _ATEN.where.ScalarOther),
        *(_ATEN.to.device, _ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.type_as.default),
        *(_ATEN.chunk.default, _ATEN.contiguous.default, _ATEN.reshape.default),
        *(_ATEN.flatten.using_ints, _ATEN.unflatten.int, _ATEN.sym_size.int),
        *(_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.linear.default, _ATEN.matmul.default),
        *(_ATEN.dropout.default, _ATEN.layer_norm.default, _ATEN.softmax.int),
        _ATEN.scaled_dot_product_attention.default,
    }
)
"""Composite operators whose direct translations are tested. torch.onnx also has wrong ones (of GRU,
for example), which it never uses."""

_OTHER_NAMES: dict[object, Any] = {
    _ATEN.min.other: _ATEN.minimum.default,
    _ATEN.max.other: _ATEN.maximum.default,
}
"""Composite operators that are another one by a second name."""


class TranslatableProgram(ExportedProgram):
    """An exported program whose operators are all translated without decomposition."""

    def run_decompositions(self, *_: Any, **__: Any) -> ExportedProgram:
        """Return the program itself: nothing needs to be decomposed."""
        return self


def lift(program: Program) -> ExportedProgram | None:
    """The program's own graph with its tensors lifted to inputs; None if it must be traced again.

    Shapes are propagated through the entire graph, with one symbol per axis name; the shapes that
    capture and passes recorded are not used. Graphs with subgraphs, with operators that write where
    others can see it, or with composite operators other than `_COMPOSED` must be traced again.
    """
    graph, tensors = without_assertions(program), program.tensors()
    written = write_out_of_place(graph)
    for node in graph.nodes:
        node.target = _OTHER_NAMES.get(node.target, node.target)
    translatable = all(
        node.op in ("placeholder", "output")
        or (node.op == "get_attr" and str(node.target) in tensors)
        or (node.op == "call_function" and _is_translatable(node.target))
        for node in graph.nodes
    )
    if not translatable:
        return None
    constants = _constants(program, graph)
    lifted = _lift_tensors(graph)
    propagate(graph, program, {node: tensors[name] for node, name in lifted.items()})
    if any(node.meta["val"].dtype != operand.meta["val"].dtype for node, operand in written):
        return None
    inputs = [_input(node, lifted, constants) for node in graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves(output_value(graph), is_leaf=lambda leaf: leaf is None)
    graph.output_node().args = (tuple(leaves),)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(leaf), None) for leaf in leaves]
    in_spec, out_spec = input_spec(program.graph), pytree.tree_structure(tuple(leaves))
    call = ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec)
    return TranslatableProgram(
        root={},
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={name: tensors[name] for name in lifted.values()},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", call)],
    )


def retrace(program: Program, module: fx.GraphModule | None = None) -> ExportedProgram:
    """Export the program again, with the dynamic dimensions of its capture.

    Args:
        program: The program.
        module: What is exported, with its inputs and outputs; None takes its own graph.
    """
    args, kwargs = program.example
    shapes: list[Any] = [
        {a: Dim.AUTO for a, size in enumerate(leaf.shape) if isinstance(size, str)} or None
        for leaf in program.signature.inputs
    ]
    names = argument_names(program.graph)
    shape_args, shape_kwargs = pytree.tree_unflatten(shapes, input_spec(program.graph))
    dynamic = dict(zip(names, [*shape_args, *shape_kwargs.values()], strict=True))
    if module is None:
        module = program.module.rebuild(without_assertions(program), program.tensors())
    return torch.export.export(module, args, dict(kwargs), dynamic_shapes=dynamic, strict=False)


def _is_translatable(target: object) -> bool:
    """Whether a call writes to none of its inputs and needs no decomposition."""
    if not isinstance(target, OpOverload):
        return not isinstance(target, HigherOrderOperator)
    return not schema_of(target).is_mutable and (not is_composed(target) or target in _COMPOSED)


def _lift_tensors(graph: fx.Graph) -> dict[fx.Node, str]:
    """Turn tensors that nodes read into inputs before all others; input → name of the tensor."""
    first = next(iter(graph.nodes))
    made: dict[str, fx.Node] = {}
    readers = [node for node in graph.nodes if node.op == "get_attr"]
    for node in readers:
        name = str(node.target)
        if name not in made:
            with graph.inserting_before(first):
                made[name] = graph.placeholder(f"t_{name.replace('.', '_')}")
        node.replace_all_uses_with(made[name])
    for node in readers:
        graph.erase_node(node)
    return {node: name for name, node in made.items()}


def _constants(program: Program, graph: fx.Graph) -> dict[fx.Node, Any]:
    """The inputs that are not tensors, with their values."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    pairs = zip(nodes, program.signature.inputs, strict=True)
    return {node: leaf.value for node, leaf in pairs if leaf.dtype is None}


def _input(
    node: fx.Node, tensors: Mapping[fx.Node, str], constants: Mapping[fx.Node, Any]
) -> InputSpec:
    if node in tensors:
        kind, target = InputKind.BUFFER, tensors[node]
        return InputSpec(kind, TensorArgument(node.name), target, persistent=True)
    if node in constants:
        argument: Any = ConstantArgument(node.name, constants[node])
        return InputSpec(InputKind.USER_INPUT, argument, None)
    return InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None)


def _argument(leaf: object) -> Any:
    if isinstance(leaf, fx.Node):
        return TensorArgument(leaf.name)
    return ConstantArgument("", leaf)  # type: ignore[arg-type]
