"""The quantized layers: constants of codes, and the operators that dequantize them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from qalora_compile.errors import InternalError
from qalora_compile.exporters.openvino.experts import by_expert, members
from qalora_compile.exporters.openvino.library import openvino, operators
from qalora_compile.ir.spec import BLOCK_EMBEDDING, EXPERT_GROUP_QUANT_LINEAR, GROUP_QUANT_LINEAR

_CODES = ".qweight"
_PRODUCT, _LOOKUP = str(GROUP_QUANT_LINEAR), str(BLOCK_EMBEDDING)
_EXPERTS = str(EXPERT_GROUP_QUANT_LINEAR)


class Weights:
    """Builds the weights of one model; a weight that is read several times is built once.

    Args:
        tensors: The tensors of the lowered program, which the frontend's constants share.

    Attributes:
        made: Path of a weight and operator of this package → the nodes that compute it, in the
            order of the graph.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        self._built: dict[str, Any] = {}
        self.made: dict[tuple[str, str], list[Any]] = defaultdict(list)

    @property
    def layers(self) -> int:
        """The number of matrix products."""
        return sum(len(made) for (_, op), made in self.made.items() if op == _PRODUCT)

    def names(self) -> set[str]:
        """The names of all nodes that were made."""
        return {node.get_friendly_name() for made in self.made.values() for node in made}

    def emit_linear(self, context: Any) -> Any:
        """The outputs of `qalora.group_quant_linear`."""
        path, weight = self._weight(context)
        return self._product(path, context.get_input(0), weight).outputs()

    def emit_experts(self, context: Any) -> Any:
        """The outputs of `qalora.expert_group_quant_linear`."""
        stacks = zip(*(members(context.get_input(i)) for i in (1, 2, 3)), strict=True)
        bits, group = (int(context.get_values_from_const_input(i)) for i in (5, 6))
        each = [self._built_weight(parts, bits, group) for parts in stacks]

        def compute(expert: int, rows: Any) -> Any:
            product = self._product(each[expert][0], rows, each[expert][1])
            product.set_friendly_name(f"{each[expert][0]}/{product.get_type_name()}")
            return product

        width = int(each[0][1].get_output_shape(0)[0])
        joined = by_expert(context, 4, len(each), width, compute)
        self.made[each[0][0], _EXPERTS].append(joined)
        return joined.outputs()

    def emit_embedding(self, context: Any) -> Any:
        """The outputs of `qalora.block_embedding`."""
        op = operators()
        path, weight = self._weight(context)
        k = int(context.get_values_from_const_input(6))
        rows = op.gather(weight, context.get_input(0), op.constant(np.int64(0)))
        if weight.get_output_shape(0)[1] != k:
            start, stop, step, axis = (op.constant(np.array([v])) for v in (0, k, 1, -1))
            rows = op.slice(rows, start, stop, step, axis)
        self.made[path, _LOOKUP].append(rows)
        return rows.outputs()

    def _product(self, path: str, x: Any, weight: Any) -> Any:
        product = operators().matmul(x, weight, False, True)
        self.made[path, _PRODUCT].append(product)
        return product

    def _weight(self, context: Any) -> tuple[str, Any]:
        """Path and dequantized weight of a layer, whose inputs 1 to 5 hold it."""
        stored = [context.get_input(i).get_node() for i in (1, 2, 3)]
        bits, group = (int(context.get_values_from_const_input(i)) for i in (4, 5))
        return self._built_weight(stored, bits, group)

    def _built_weight(self, constants: Sequence[Any], bits: int, group: int) -> tuple[str, Any]:
        """Path and dequantized weight `[N, L · g]` of codes, scale and zero-point.

        Codes, scale and zero-point keep their types in the file and are converted to float32
        before any arithmetic, so that nothing is rounded.
        """
        op = operators()
        codes, scale, zero_point = constants
        name = self._name(codes)
        path = name.removesuffix(_CODES)
        if name not in self._built:
            n, groups = scale.get_output_shape(0)
            stored = op.constant(_code_tensor(codes.data, bits, (n, groups, group)))
            stored.set_friendly_name(name)
            parts = [stored]
            for which, node in (("zero_point", zero_point), ("scale", scale)):
                parts.append(op.constant(node.data.reshape(n, groups, 1)))
                parts[-1].set_friendly_name(f"{path}.{which}")
            wide = [op.convert(p, "f32") if p.get_element_type() != _f32() else p for p in parts]
            weight = op.multiply(op.subtract(wide[0], wide[1]), wide[2])
            shape = op.constant(np.array([n, groups * group], np.int64))
            self._built[name] = op.reshape(weight, shape, False)
        return path, self._built[name]

    def _name(self, constant: Any) -> str:
        """The name of the tensor whose memory a constant shares."""
        name = self._names.get(constant.data.ctypes.data)
        if name is None:
            raise InternalError("the codes of a layer are no tensor of the program")
        return name


def _f32() -> Any:
    return openvino().Type.f32


def _code_tensor(packed: Any, bits: int, shape: tuple[int, int, int]) -> Any:
    """Codes `[N, L, g · bits / 8]`, low bits first, as a tensor `[N, L, g]` of `bits` bits.

    OpenVINO packs small integers in the same order.
    """
    library = openvino()
    tensor = library.Tensor(getattr(library.Type, f"u{bits}"), library.Shape(shape))
    tensor.data.reshape(-1).view(np.uint8)[:] = packed.reshape(-1)
    return tensor
