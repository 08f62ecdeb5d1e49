"""Names and shapes of inputs and outputs, and the key-value cache as state."""

from __future__ import annotations

from typing import Any

import numpy as np

from qalora_compile.exporters.onnx.model import tensor_outputs
from qalora_compile.exporters.openvino.library import openvino, operators
from qalora_compile.ir.meta import PAST
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import InputLeaf

_PRESENT, _BEAMS, _CROSS = "present.", "beam_idx", ".encoder."


def name_interface(model: Any, program: Program) -> None:
    """Give inputs and outputs the names of the signature, and inputs their shapes.

    Constant inputs (`use_cache=False`) are part of the graph, and no parameters of the model.
    """
    shape_of = openvino().PartialShape
    for node in model.get_ops():
        for output in node.outputs():
            output.get_tensor().set_names(set())
    parameters = list(model.get_parameters())
    for parameter, leaf in zip(parameters, program.signature.inputs, strict=True):
        if leaf.dtype is None:
            model.remove_parameter(parameter)
            continue
        parameter.set_friendly_name(leaf.name)
        parameter.output(0).get_tensor().set_names({leaf.name})
        sizes = [-1 if isinstance(size, str) else size for size in leaf.shape]
        parameter.set_partial_shape(shape_of(sizes))
    for output, name in zip(model.outputs, tensor_outputs(program), strict=True):
        output.get_tensor().add_names({name})
        output.get_node().set_friendly_name(name)
    model.validate_nodes_and_infer_types()


def make_stateful(model: Any, program: Program) -> None:
    """Move the key-value cache into the model.

    Each past becomes a variable, which is reordered by the input `beam_idx`, `[batch]` int32, when
    it is read. It is empty at first: its batch is that of the first input. This is the form that
    OpenVINO GenAI and Optimum run. The keys and values that a decoder computes from its encoder's
    states are state too, which is computed in the first step after a reset.
    """
    op, library = operators(), openvino()
    by_name = {parameter.get_friendly_name(): parameter for parameter in model.get_parameters()}
    beams = op.parameter([-1], library.Type.i32, name=_BEAMS)
    beams.output(0).get_tensor().set_names({_BEAMS})
    first = next(leaf.name for leaf in program.signature.inputs if leaf.name in by_name)
    axis = op.constant(np.int64(0))
    batch = op.gather(op.shape_of(by_name[first], "i64"), op.constant(np.array([0])), axis)
    results = {result.get_friendly_name(): result for result in model.get_results()}
    sinks = []
    for leaf in program.signature.own_cache or program.signature.cache:
        past, result = by_name[leaf.name], results[leaf.name.replace(PAST, _PRESENT)]
        name = f"{leaf.name}{result.get_friendly_name()}"
        sizes = [-1 if isinstance(size, str) else size for size in leaf.shape]
        variable = _variable(openvino().PartialShape(sizes), name)
        read = operators_of_state().read_value(_empty(leaf, batch), variable)
        reordered = op.gather(read, beams, axis)
        for reader in past.output(0).get_target_inputs():
            reader.replace_source_output(reordered.output(0))
        sinks.append(operators_of_state().assign(_node(result.input_value(0)), variable))
        model.remove_parameter(past)
        model.remove_result(result)
    sinks += [_kept(model, name, results[name]) for name in results if _CROSS in name]
    model.add_parameters([beams])
    model.add_sinks(sinks)
    model.validate_nodes_and_infer_types()


def _kept(model: Any, name: str, result: Any) -> Any:
    """Make an output a state that keeps its first value; returns what assigns it."""
    value = result.input_value(0)
    readers = [reader for reader in value.get_target_inputs() if reader.get_node() != result]
    past = name.replace(_PRESENT, PAST)
    variable = _variable(value.get_partial_shape(), f"{past}{name}")
    read = operators_of_state().read_value(value, variable)
    for reader in readers:
        reader.replace_source_output(read.output(0))
    model.remove_result(result)
    return operators_of_state().assign(read, variable)


def _node(output: Any) -> Any:
    """A node whose only output is `output`: a variable is assigned a node."""
    node = output.get_node()
    return node if len(node.outputs()) == 1 else operators().concat([output], 0)


def operators_of_state() -> Any:
    """The operator set of variables, which later sets contain unchanged."""
    return openvino("opset6")


def _variable(shape: Any, name: str) -> Any:
    util = openvino("op.util")
    info = util.VariableInfo()
    info.variable_id = name
    info.data_type = openvino().Type.f32
    info.data_shape = shape
    return util.Variable(info)


def _empty(leaf: InputLeaf, batch: Any) -> Any:
    """A cache of no tokens, for a batch."""
    op = operators()
    _, heads, _, width = leaf.shape
    sizes = [op.constant(np.array([size], np.int64)) for size in (heads, 0, width)]
    return op.broadcast(op.constant(np.float32(0)), op.concat([batch, *sizes], 0))
