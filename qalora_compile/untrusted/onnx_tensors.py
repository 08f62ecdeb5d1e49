"""Tensors of an ONNX file: their places, and the claims of nodes about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import member, quoted
from qalora_compile.untrusted.element_types import ELEMENT_TYPES

BITS = {kind.onnx: kind.bits for kind in ELEMENT_TYPES if kind.onnx}
"""Bits of an element, by the number of a type (`onnx.TensorProto.DataType`)."""
MAX_MADE = 1 << 31
"""Limit of the elements that constants may make an operator allocate when the file is loaded."""
_MICROSOFT, _QALORA = "com.microsoft", "qalora"


@dataclass(frozen=True)
class TensorRow:
    """The description of a tensor.

    Attributes:
        name, kind, shape: Name, element type and shape as the file says.
        external: `location`, `offset` and `length` of a tensor that is in another file.
        inside: Offset and length of raw bytes in the model's own file.
        numbers: The values of a small int64 tensor in the file; otherwise None.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    external: Mapping[str, str] | None = None
    inside: tuple[int, int] | None = None
    numbers: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def external_file(row: TensorRow, path: Path) -> tuple[Path, int, int]:
    """File, offset and length of a tensor that is outside the model's file.

    Raises:
        UserInputError: offset or length is not a number, the file is not in the model's folder, or
            it does not hold all bytes of the tensor.
    """
    stated = row.external or {}
    unknown = stated.keys() - {"location", "offset", "length", "checksum"}
    odd = [key for key in ("offset", "length") if not _is_size(stated.get(key, "0"))]
    if unknown or odd or row.kind not in BITS:
        what = ", ".join(f"{key} {quoted(stated.get(key))}" for key in (*unknown, *odd)) or "a text"
        raise UserInputError(f"the place of {quoted(row.name)} is given as {what}", where=str(path))
    file = member(path.parent, stated.get("location"))
    if file.resolve() == path.resolve():
        raise UserInputError(f"{quoted(row.name)} is in the model's own file", where=str(path))
    offset, size = int(stated.get("offset", "0")), file.stat().st_size
    wanted = -(-row.size * BITS[row.kind] // 8)
    length = int(stated.get("length", str(wanted)))
    if length != wanted or offset + length > size:
        raise UserInputError(
            f"{quoted(row.name)} {list(row.shape)} takes {wanted} bytes, and its place is "
            f"{length} bytes from {offset} on in {file.name}, which has {size}",
            where=str(path),
            hint="the two files do not belong together, or one is truncated: export again",
        )
    return file, offset, length


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def check_node(
    kind: str,
    domain: str,
    inputs: list[TensorRow | None],
    attributes: Mapping[str, Any],
    path: Path,
) -> None:
    """Compare attributes of a node that kernels trust with its constant inputs.

    ONNX Runtime packs weights when it loads a file, and up to 1.27 it took their size from the
    attributes alone. It also allocates the shapes that constants ask for.

    Raises:
        UserInputError: the weights are smaller than the attributes say, or constants ask for more
            than 2³¹ elements.
    """
    if kind == "ConstantOfShape" and not domain and inputs and inputs[0] is not None:
        asked = inputs[0].numbers or ()
        if any(axis < 0 for axis in asked) or math.prod(asked) > MAX_MADE:
            raise UserInputError(f"a {kind} asks for {list(asked)} elements", where=str(path))
    for index, wanted in _packed_shapes(kind, domain, attributes).items():
        given = inputs[index] if index < len(inputs) else None
        if given is not None and given.shape not in wanted(given):
            raise UserInputError(
                f"a {kind} says that its input {index} ({quoted(given.name)}) is "
                f"{list(wanted(given)[0])}, and it is {list(given.shape)}",
                where=str(path),
                hint="the file was changed, or written by a broken exporter: export it again",
            )


def _packed_shapes(kind: str, domain: str, attributes: Mapping[str, Any]) -> dict[int, Any]:
    """For each input of a node on quantized weights, the shapes that its attributes allow.

    Scales and zero-points may be flat; byte zero-points of MatMulNBits are packed.
    """
    ours = (domain, kind) == (_QALORA, "GroupQuantLinear")
    if not ours and (domain, kind) != (_MICROSOFT, "MatMulNBits"):
        return {}
    defaults = {"K": 0, "N": 0, "bits": 4, "group_size" if ours else "block_size": 0}
    k, n, bits, block = (attributes.get(name, default) for name, default in defaults.items())
    numbers = [v for v in (k, n, bits, block) if isinstance(v, int) and 0 < v < 1 << 31]
    if len(numbers) != 4 or bits > 8:
        return {1: lambda _: [(0, 0, 0)]}
    blocks = -(-k // block)
    groups = [(n, blocks), (n * blocks,), (n, blocks, 1)]
    packed = -(-blocks * bits // 8)
    zeros = [(n, packed), (n * packed,)]
    return {
        1: lambda _: [(n, blocks, block * bits // 8)],
        2: lambda _: groups,
        3: lambda given: zeros if given.kind == 2 and not ours else groups,
    }
