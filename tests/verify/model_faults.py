"""Faults of exporters: planted in ONNX files of every target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tests.verify.planted import Fault

Array = np.ndarray[Any, np.dtype[Any]]
_NO_KERNEL = (
    "ONNX Runtime has a kernel for MatMulNBits and never takes its function; other runtimes do",
)
_NEVER_DROPS = (
    "ONNX Runtime's build for inference never drops, whatever the node says; other runtimes do",
)
_SAME_OUTPUTS = ("the outputs are equal: only the names that the file gives its layers are wrong",)


def _values(name: str, change: Callable[[Array], Array]) -> Callable[[Any], None]:
    """A change of an initializer; of small integers, of their bytes."""

    def plant(model: Any) -> None:
        proto = _tensor(model, name)
        if proto.data_type in (onnx.TensorProto.UINT4, onnx.TensorProto.UINT2):
            raw = np.frombuffer(proto.raw_data, np.uint8)
            proto.raw_data = change(raw.copy()).astype(np.uint8).tobytes()
            return
        values = numpy_helper.to_array(proto)
        changed = change(values.copy()).astype(values.dtype)
        proto.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), name))

    return plant


def _tensor(model: Any, name: str) -> Any:
    return next(t for t in model.graph.initializer if t.name == name)


def _node(model: Any, op: str, index: int = 0) -> Any:
    return [n for n in model.graph.node if n.op_type == op][index]


def _named(model: Any, name: str) -> Any:
    return next(n for n in model.graph.node if n.name == name)


def _attribute(op: str, name: str, value: Any, index: int = 0) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        node = _node(model, op, index)
        for attribute in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(attribute)
        node.attribute.append(onnx.helper.make_attribute(name, value))

    return plant


def _operator(op: str, new: str, index: int = 0) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        _node(model, op, index).op_type = new

    return plant


def _reread(name: str, place: int, value: str) -> Callable[[Any], None]:
    """Another operand of a named node."""

    def plant(model: Any) -> None:
        _named(model, name).input[place] = value

    return plant


def _exchanged_operands(name: str, first: int, second: int) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        given = _named(model, name).input
        given[first], given[second] = given[second], given[first]

    return plant


def _exchanged(*parts: str) -> Callable[[Any], None]:
    """Tensors of q and k exchanged."""

    def plant(model: Any) -> None:
        for part in parts:
            first, second = _tensor(model, f"q.{part}"), _tensor(model, f"k.{part}")
            first.name, second.name = f"k.{part}", f"q.{part}"

    return plant


def _bypass(name: str, place: int = 0) -> Callable[[Any], None]:
    """A named node gives its operand as it is."""

    def plant(model: Any) -> None:
        node = _named(model, name)
        kept = node.input[place]
        node.op_type, node.domain = "Identity", ""
        del node.input[:], node.attribute[:]
        node.input.append(kept)

    return plant


def _insert_after(value: str, *nodes: tuple[str, dict[str, Any]]) -> Callable[[Any], None]:
    """A chain of nodes behind a value, for all of its readers."""

    def plant(model: Any) -> None:
        last, made = value, []
        for index, (op, attributes) in enumerate(nodes):
            made.append(onnx.helper.make_node(op, [last], [f"planted{index}"], **attributes))
            last = f"planted{index}"
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == value:
                    node.input[place] = last
        at = next(i for i, n in enumerate(model.graph.node) if value in n.output)
        nodes_after = list(model.graph.node)
        nodes_after[at + 1 : at + 1] = made
        del model.graph.node[:]
        model.graph.node.extend(nodes_after)

    return plant


def _dropout(model: Any) -> None:
    """Dropout in training mode behind the gate."""
    ratio = numpy_helper.from_array(np.array(0.1, np.float32), "ratio")
    mode = numpy_helper.from_array(np.array(True), "mode")
    model.graph.initializer.extend([ratio, mode])
    value = _gate(model).output[0]
    _insert_after(value, ("Dropout", {"seed": 1}))(model)
    next(n for n in model.graph.node if n.op_type == "Dropout").input.extend(["ratio", "mode"])


def _gate(model: Any) -> Any:
    return next(n for n in model.graph.node if n.op_type == "Mul" and n.input[0].startswith("q/"))


def _bias_twice(model: Any) -> None:
    """Of q, behind its output."""
    bias = "q.bias"
    value = "q/output"
    _insert_after(value, ("Add", {}))(model)
    next(n for n in model.graph.node if "planted0" in n.output).input.append(bias)


def _no_bias(model: Any) -> None:
    _bypass("q/Bias")(model)


def _other_residual(model: Any) -> None:
    """The last residual adds the embedding."""
    add = next(n for n in model.graph.node if n.op_type == "Add" and "down/output" in n.input)
    place = 1 - list(add.input).index("down/output")
    add.input[place] = _node(model, "Gather").output[0]


def _no_residual(model: Any) -> None:
    add = next(n for n in model.graph.node if n.op_type == "Add" and "down/output" in n.input)
    add.op_type = "Identity"
    del add.input[:]
    add.input.append("down/output")


def _relabel(model: Any) -> None:
    """The file says of q what is true of k."""
    entry = next(p for p in model.metadata_props if p.key == "qalora")
    entry.value = entry.value.replace('"q": "q/output"', '"q": "-"')
    entry.value = entry.value.replace('"k": "k/output"', '"k": "q/output"')
    entry.value = entry.value.replace('"q": "-"', '"q": "k/output"')


def _in_function(
    function: str, output: str, change: Callable[[Any], None]
) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        body = next(f for f in model.functions if f.name == function)
        change(next(n for n in body.node if output in n.output))

    return plant


def _forget(node: Any) -> None:
    """An addition gives its first operand."""
    kept = node.input[0]
    node.op_type = "Identity"
    del node.input[:]
    node.input.append(kept)


def _retype(new: str) -> Callable[[Any], None]:
    def change(node: Any) -> None:
        node.op_type = new

    return change


def _nibbles(raw: Array) -> Array:
    return (raw & 15) << 4 | raw >> 4


def _first(change: Callable[[Any], Any]) -> Callable[[Array], Array]:
    """A change of the first element."""

    def apply(values: Array) -> Array:
        values.reshape(-1)[0] = change(values.reshape(-1)[0])
        return values

    return apply


def _scramble(values: Array) -> Array:
    return values.T.reshape(values.shape)


def _last_columns(count: int, factor: float) -> Callable[[Array], Array]:
    def apply(values: Array) -> Array:
        values[:, -count:] *= factor
        return values

    return apply


def _tail(values: Array) -> Array:
    values[-1] = 0
    return values


def _other_sums(model: Any) -> None:
    """The correction of `up` takes the group-sums of what q reads."""
    sums = _named(model, "q/Correction").input[0]
    _named(model, "up/Correction").input[0] = sums


def _other_digits(model: Any) -> None:
    """The digits of `up` are multiplied by the group-sums of what q reads."""
    joins = [n for n in model.graph.node if n.op_type == "Concat" and len(n.input) == 4]
    joins[1].input[1] = joins[0].input[1]


def _transposed(raw: Array) -> Array:
    codes = np.stack([raw & 15, raw >> 4], -1).reshape(48, 48).T.reshape(-1, 2)
    return codes[:, 0] | codes[:, 1] << 4


MODEL_FAULTS = [
    # GroupQuantLinear
    Fault("zero-point off by one", "ort", _values("q.zero_point", _first(lambda z: z + 1)), "q:"),
    Fault("zero-points rounded", "ort", _values("k.zero_point", np.round), "k:"),
    Fault(
        "scale and zero-point exchanged",
        "ort",
        _exchanged_operands("v/GroupQuantLinear", 2, 3),
        "v:",
    ),
    Fault("nibbles swapped", "ort", _values("up.qweight", _nibbles), "up:"),
    Fault("groups permuted", "ort", _values("down.scale", lambda s: s[:, ::-1]), "down:"),
    Fault("sign of the zero-points", "ort", _values("q.zero_point", np.negative), "q:"),
    Fault(
        "weights of q and k exchanged", "ort", _exchanged("qweight", "scale", "zero_point"), "q:"
    ),
    Fault(
        "labels of q and k exchanged", "ort", _relabel, "q:", unseen=(("numeric", *_SAME_OUTPUTS),)
    ),
    Fault(
        "bits of a node",
        "ort",
        _attribute("GroupQuantLinear", "bits", 8),
        "q:",
        "does not run",
    ),
    Fault(
        "function without correction", "ort", _in_function("GroupQuantLinear", "y", _forget), "q:"
    ),
    Fault(
        "function rounds twice",
        "ort",
        _in_function("GroupQuantLinear", "rest", _retype("Max")),
        "q:",
    ),
    Fault(
        "function of MatMulNBits without zero-points",
        "ort",
        _in_function("MatMulNBits", "level", _forget),
        "q:",
        unseen=(("numeric", *_NO_KERNEL),),
    ),
    Fault("bias twice", "ort", _bias_twice, "q:", "up", node="input of up"),
    Fault("bias missing", "ort", _no_bias, "q:"),
    # MatMulNBits
    Fault(
        "zero-point off by one", "ort-stock", _values("q.zero_point", _first(lambda z: z + 1)), "q:"
    ),
    Fault("correction dropped", "ort-stock", _bypass("k/Add"), "k:"),
    Fault("correction scrambled", "ort-stock", _values("v.correction", _scramble), "v:"),
    Fault("sign of the correction", "ort-stock", _values("q.correction", np.negative), "q:"),
    Fault("tail of the correction dropped", "ort-stock", _values("q.correction", _tail), "q:"),
    Fault("group-sums of another input", "ort-stock", _other_sums, "up:"),
    Fault(
        "scale of one block",
        "ort-stock",
        _values("down.scale", _first(lambda s: s * 1.01)),
        "down:",
    ),
    Fault(
        "bits of a node",
        "ort-stock",
        _attribute("MatMulNBits", "bits", 8),
        "q:",
        "does not run",
    ),
    Fault("bias of another layer", "ort-stock", _reread("q/MatMulNBits", 5, "k.bias"), "q:"),
    Fault("scale of a digit", "digits", _values("up.scale", _last_columns(2, 1.5)), "up:"),
    Fault("two digits dropped", "digits", _values("q.scale", _last_columns(2, 0.0)), "q:"),
    Fault("digits of another input", "digits", _other_digits, "up:"),
    # DequantizeLinear
    Fault("one code changed", "onnx", _values("q.qweight", _first(lambda c: c ^ 4)), "q:"),
    Fault("nibbles swapped", "onnx", _values("v.qweight", _nibbles), "v:"),
    Fault(
        "zero-points of two columns",
        "onnx",
        _values("up.zero_point", _first(lambda z: z ^ 17)),
        "up:",
    ),
    Fault("missed transpose", "onnx", _values("q.qweight", _transposed), "q:"),
    Fault("correction dropped", "onnx", _bypass("down/Add"), "down:"),
    Fault("bias missing", "onnx", _bypass("k/Bias"), "k:"),
    # what stands around the layers
    Fault("activation replaced", "onnx", _operator("Sigmoid", "Tanh"), "input of up", "up"),
    Fault("residual removed", "ort", _no_residual, "output output", "after the last site"),
    Fault(
        "residual of another tensor",
        "ort-stock",
        _other_residual,
        "output output",
        "after the last site",
    ),
    Fault(
        "eps of a norm",
        "onnx",
        _attribute("LayerNormalization", "epsilon", 1e-3),
        "input of q",
        "q",
    ),
    Fault(
        "dropout left on",
        "ort-stock",
        _dropout,
        "input of up",
        unseen=(("numeric", *_NEVER_DROPS),),
    ),
    Fault(
        "cast to half and back",
        "ort",
        _insert_after("up/output", ("Cast", {"to": 10}), ("Cast", {"to": 1})),
        "input of down",
        "down",
    ),
    Fault(
        "activation added", "ort", _insert_after("up/output", ("Relu", {})), "input of down", "down"
    ),
    Fault(
        "embedding of one word",
        "onnx",
        _values("lm_head.weight", _first(lambda w: w + 1)),
        "input of q",
        "q",
    ),
]
