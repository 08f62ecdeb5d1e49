"""The quantized layers: constants that Core ML dequantizes, and the operators that read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qalora_compile.errors import InternalError, UnsupportedError
from qalora_compile.ir.coreml_package import coremltools

_CODES = ".qweight"
_LINEAR_AXES = 3
"""The most axes that `linear` takes."""
_BITS = {4: "uint4", 8: "uint8"}


class Weights:
    """Builds the weights of one model; a weight that is read several times is built once.

    Attributes:
        names: Name of an input of the exported graph → name of the tensor that it stands for.
        made: Path of a weight → name of its constant.
        layers: The number of matrix products.
    """

    def __init__(self) -> None:
        self.names: Mapping[str, str] = {}
        self._built: dict[str, Any] = {}
        self.made: dict[str, str] = {}
        self.layers = 0

    def emit_linear(self, context: Any, node: Any) -> None:
        """`qalora.group_quant_linear`."""
        x, weight = context[node.inputs[0]], self._weight(context, node)
        op = mil().Builder
        if len(x.shape) <= _LINEAR_AXES:
            y = op.linear(x=x, weight=weight, name=node.name)
        else:
            y = op.matmul(x=x, y=weight, transpose_y=True, name=node.name)
        context.add(y)
        self.layers += 1

    def emit_embedding(self, context: Any, node: Any) -> None:
        """`qalora.block_embedding`."""
        op, weight = mil().Builder, self._weight(context, node)
        ids, k = context[node.inputs[0]], int(node.inputs[6])
        padded = weight.shape[1] != k
        rows = op.gather(x=weight, indices=ids, axis=0, **({} if padded else {"name": node.name}))
        if padded:
            ends = [0] * len(ids.shape) + [k]
            kept = [True] * len(ids.shape) + [False]
            begins = [0] * len(ends)
            rows = op.slice_by_index(x=rows, begin=begins, end=ends, end_mask=kept, name=node.name)
        context.add(rows)

    def emit_alias(self, context: Any, node: Any) -> None:
        """`aten.alias`, which is its operand."""
        context.add(context[node.inputs[0]], node.name)

    def _weight(self, context: Any, node: Any) -> Any:
        """The constant `[N, L · g]` of a layer, whose inputs 1 to 3 hold it."""
        name = self.names.get(node.inputs[1])
        if name is None:
            raise InternalError("the codes of a layer are no tensor of the program")
        if name not in self._built:
            codes, scale, zero_point = (context[one].val for one in node.inputs[1:4])
            path, bits = name.removesuffix(_CODES), int(node.inputs[4])
            self.made[path] = self._free_name(path)
            self._built[name] = mil().Builder.constexpr_blockwise_shift_scale(
                data=_code_array(codes, bits),
                scale=np.asarray(scale, np.float32),
                offset=np.asarray(zero_point, np.float32),
                name=self.made[path],
            )
        return self._built[name]

    def _free_name(self, path: str) -> str:
        """A name for the constant of a weight, as Core ML takes names."""
        name = f"{legal_name(path)}_weight"
        while name in self.made.values():
            name += "_"
        return name


def mil() -> Any:
    """The builder of operators, and the element types, as attributes `Builder` and `types`."""
    return coremltools("converters.mil.mil")


def legal_name(name: str) -> str:
    """A name with an underscore for each character that Core ML's names do not have."""
    made = re.sub(r"\W", "_", name, flags=re.ASCII)
    return made if not made[:1].isdigit() else f"_{made}"


def register(weights: Weights, operators: Mapping[str, str]) -> None:
    """Let coremltools convert operators of this package by methods of `weights`.

    Args:
        weights: Of the model that is converted next; it replaces that of the last one.
        operators: Name of an operator, `namespace::name` → name of the method.
    """
    register_op = coremltools("converters.mil.frontend.torch.torch_op_registry").register_torch_op
    for name, method in operators.items():

        def emit(context: Any, node: Any, method: str = method) -> None:
            getattr(weights, method)(context, node)

        emit.__name__ = name.replace("::", "_")
        register_op(emit, torch_alias=[name], override=True)


def _code_array(packed: Any, bits: int) -> Any:
    """Codes `[N, L, g · bits / 8]`, low bits first, as `[N, L · g]` of the element type.

    Raises:
        UnsupportedError: Core ML's constants have no such type.
    """
    types = mil().types
    if bits not in _BITS:
        raise UnsupportedError(
            f"Core ML holds no codes of {bits} bits", hint="lower the program with legalize-coreml"
        )
    rows = np.asarray(packed).reshape(len(packed), -1)
    parts = [rows >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    codes = np.stack(parts, axis=-1).reshape(len(rows), -1)
    return codes.astype(types.nptype_from_builtin(getattr(types, _BITS[bits])))
