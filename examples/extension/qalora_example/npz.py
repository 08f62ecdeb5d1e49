"""Target `npz`: the weights for a program in NumPy, one byte a code, and the graph as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qalora_compile import ExportSpec, Program, extend
from qalora_compile.ir.lazy_tensor import defer
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.ir.spec import GROUP_LINEAR, stored_tensor
from qalora_compile.passes.framework.rewrite import TensorNodes

_ATEN = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class LegalizeNpz(extend.Pass):
    """Write every group_linear out in operators that NumPy has, on codes of one byte.

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 4, 32)
    After:   %1 = aten.to.dtype(@fc.codes, float32)
             %2 = aten.slice.Tensor(aten.repeat_interleave(@fc.scale, 32, 1), 1, 0, K)
             %3 = aten.slice.Tensor(aten.repeat_interleave(@fc.offset, 32, 1), 1, 0, K)
             %4 = aten.linear(%x, %1 * %2 + %3, @fc.bias)

    Fires on: every group_linear.
    Leaves alone: nothing; other operators on codes are refused.
    Exactness: exact, with the rounding of float32 sums.
    """

    name: ClassVar[str] = "legalize-npz"
    consumes: ClassVar[tuple[str, ...]] = ("quantized", "folded")
    produces: ClassVar[str | None] = "legalized:npz"

    def requires(self, program: Program) -> None:
        """Embeddings and stacked experts are not on codes.

        Raises:
            UnsupportedError: one is.
        """
        for node in program.graph.nodes:
            name = str(node.target)
            if name.startswith("qalora.") and node.target is not GROUP_LINEAR:
                raise extend.UnsupportedError(
                    f"{name} has no form in target npz",
                    where=site_of(node) or node.name,
                    hint="quantize linear layers only",
                )

    def call(self, program: Program) -> extend.PassResult:
        """Rewrite in a copy of the graph."""
        graph, tensors = program.copy_graph(), program.tensors()
        nodes, changes = TensorNodes(graph), []
        sizes = {site.name: site.k for site in program.plan}
        for node in [node for node in graph.nodes if node.target is GROUP_LINEAR]:
            layer, k = GroupLinear.of(node), sizes[site_of(node) or ""]
            path = str(layer.qweight.target).removesuffix(".qweight")

            def unpack(packed: Tensor, bits: int = layer.bits, k: int = k) -> dict[str, Tensor]:
                return {"codes": unpack_codes(packed, bits, k)}

            if f"{path}.codes" not in tensors:
                packed = stored_tensor(program, node, layer.qweight)
                tensors[f"{path}.codes"] = defer(unpack, packed)["codes"]
                changes.append(extend.Change(path, f"{layer.bits} bits in bytes"))
            codes = nodes.get(f"{path}.codes")
            with graph.inserting_before(node):
                weight = graph.call_function(_ATEN.to.dtype, (codes, torch.float32))
                for operator, parameter in (
                    (_ATEN.mul.Tensor, layer.scale),
                    (_ATEN.add.Tensor, layer.offset),
                ):
                    repeat = _ATEN.repeat_interleave.self_int
                    wide = graph.call_function(repeat, (parameter, layer.group_size, 1))
                    wide = graph.call_function(_ATEN.slice.Tensor, (wide, 1, 0, k))
                    weight = graph.call_function(operator, (weight, wide))
                y = graph.call_function(_ATEN.linear.default, (layer.x, weight, layer.bias))
            move_site(node, y)
            node.replace_all_uses_with(y)
            erase_unread([node])
        return extend.PassResult(program.evolve(graph=graph, tensors=tensors), tuple(changes))


def lowering(program: Program, spec: ExportSpec) -> str:
    """The passes to stage `legalized:npz`."""
    return "remove-unit-scale,legalize-npz"


def write(program: Program, folder: Path, spec: ExportSpec) -> list[extend.StoredTensor]:
    """Write `weights.npz` and `graph.txt` into an empty folder."""
    arrays: dict[str, Any] = {
        name: extend.materialize(tensor).detach().numpy()
        for name, tensor in program.tensors().items()
    }
    np.savez(folder / "weights.npz", **arrays)
    (folder / "graph.txt").write_text(str(program), "utf-8")
    return [extend.StoredTensor(name, name, str(array.dtype)) for name, array in arrays.items()]


def capabilities(spec: ExportSpec) -> Mapping[str, extend.Capability]:
    """Nothing is rounded."""
    embeddings = extend.unsupported("they are not on codes")
    return {"codes": extend.EXACT, "scale": extend.EXACT, "embeddings on codes": embeddings}


NPZ = extend.FolderTarget(
    library="NumPy", lowering=lowering, write=write, capabilities=capabilities
)
