"""Read a written package again, and compare each quantized weight with the program's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from qalora_compile.errors import InternalError
from qalora_compile.exporters.coreml.weights import Weights
from qalora_compile.ir.coreml_package import CONSTANT, read_function
from qalora_compile.ir.ops.embedding import BlockEmbedding
from qalora_compile.ir.ops.target_kernels import GroupQuantLinear
from qalora_compile.ir.packing.kernel_layouts import unpack_groups
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import BLOCK_EMBEDDING, GROUP_QUANT_LINEAR


def stored_weights(folder: Path) -> dict[str, tuple[Any, Any, Any]]:
    """Name → codes `[N, L · g]`, scale and offset `[N, L]` of the quantized weights of a package.

    Raises:
        UserInputError, UnsupportedError: see `read_function`.
    """
    return {
        op.outputs[0].name: (op.data.val, op.scale.val, op.offset.val)
        for op in read_function(folder).operations
        if op.op_type == CONSTANT
    }


def check_weights(program: Program, weights: Weights, folder: Path) -> int:
    """Compare the weights of a package with those of the lowered program, bit for bit.

    Args:
        program: What was converted, with its tensors in memory.
        weights: The names of the constants.
        folder: The package.

    Returns:
        The number of weights.

    Raises:
        InternalError: a weight differs, or is not there.
    """
    stored, count = stored_weights(folder), 0
    for path, wanted in _of_program(program):
        # coremltools stores equal constants once, under the name of the first
        name = weights.made.get(path, "")
        found = [stored[name]] if name in stored else list(stored.values())
        if not any(_same(wanted, one) for one in found):
            raise InternalError(f"the package does not hold the weight of {path}")
        count += 1
    return count


def _of_program(program: Program) -> Iterator[tuple[str, tuple[Any, Any, Any]]]:
    """Path, codes, scale and zero-point of each weight on codes of a lowered program."""
    tensors, seen = program.tensors(), set[str]()
    for node in program.graph.nodes:
        if node.target not in (GROUP_QUANT_LINEAR, BLOCK_EMBEDDING):
            continue
        codes, bits, width = _format(node)
        path = codes.removesuffix(".qweight")
        if path in seen:
            continue
        seen.add(path)
        packed, scale, zero_point = (
            tensors[f"{path}.{name}"] for name in ("qweight", "scale", "zero_point")
        )
        k = scale.shape[1] * width
        unpacked = unpack_groups(packed, bits=bits, group_size=width, k=k)
        yield path, (unpacked.numpy(), scale.numpy(), zero_point.numpy())


def _format(node: fx.Node) -> tuple[str, int, int]:
    """Name of the codes of a layer, their width, and the codes of a group."""
    if node.target is BLOCK_EMBEDDING:
        rows = BlockEmbedding.of(node)
        return str(rows.codes.target), rows.bits, rows.block_size
    layer = GroupQuantLinear.of(node)
    return str(layer.codes.target), layer.bits, layer.group_size


def _same(wanted: tuple[Any, ...], found: tuple[Any, ...]) -> bool:
    codes, *floats = (np.asarray(one) for one in found)
    return np.array_equal(wanted[0], codes.astype(np.uint8)) and all(
        one.dtype == other.dtype and one.tobytes() == other.tobytes()
        for one, other in zip(wanted[1:], floats, strict=True)
    )
