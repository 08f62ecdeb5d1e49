"""split-planes: split a weight of 8 bits into two of 4 bits, which have float32 kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.errors import PostconditionError
from qalora_compile.ir.affine import has_integer_zero_points
from qalora_compile.ir.lazy_tensor import defer, holds
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.packing.bitstream import pack_codes, unpack_codes
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import Site
from qalora_compile.ir.spec import (
    GROUP_EMBEDDING,
    GROUP_LINEAR,
    LayerOnCodes,
    layer_on_codes,
    stored_parts,
)
from qalora_compile.ir.stages import ADAPTED, CODE_NAMES, FOLDED, PLANE_NAMES, QUANTIZED
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.rewrite import TensorNodes
from qalora_compile.progress import track

_ADD = torch.ops.aten.add.Tensor
_HALF_BITS, _STEP, _MIDDLE = 4, 16, 8
_LAYERS = (GROUP_LINEAR, GROUP_EMBEDDING)


@dataclass(frozen=True, kw_only=True)
class SplitPlanes(Pass):
    """W = W_low + 16 W_high: q = q_low + 16 q_high and z = z_low + 16 z_high, 4 bits each.

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 8, 32)
    After:   %1 = qalora.group_linear(%x, @fc.low.qweight, …, @fc.bias, 4, 32)
             %2 = qalora.group_linear(%x, @fc.high.qweight, …, None, 4, 32)
             %3 = aten.add.Tensor(%1, %2, alpha=16)

    with `offset = −scale · z` of each plane, and one scale for both. ONNX Runtime's MatMulNBits has
    no float32 kernel for 8 bits: it dequantizes the complete weight in every call. A real z is
    split into z_high = 8 and z_low = z − 128 where the type of the offset holds the offset of the
    low plane exactly, which it does for 64 ≤ z ≤ 256 (Sterbenz), and into z_high = 0 and z_low = z
    for other groups.

    Fires on: group_linear and group_embedding of 8 bits of `Site.frozen_integer_zero`, and with
    `real_zero_points` on every group_linear of 8 bits.
    Leaves alone: everything else; stacked experts keep 8 bits.
    Exactness: exact in real arithmetic. Rows that are looked up are exact in float32 as well, as
    scales of integer zero-points have 16 significant bits.

    Options:
        real_zero_points: Also split layers whose zero-points are not integers.
    """

    name: ClassVar[str] = "split-planes"
    consumes: ClassVar[tuple[str, ...]] = (QUANTIZED, ADAPTED, FOLDED)
    produces: ClassVar[str | None] = None

    real_zero_points: bool = False

    def call(self, program: Program) -> PassResult:
        """Split."""
        graph, tensors = program.copy_graph(), program.tensors()
        rows = {site.name: site for site in program.plan}
        split: dict[str, int] = {}
        nodes, changes = TensorNodes(graph), []
        for node in track([n for n in graph.nodes if n.target in _LAYERS], "split"):
            site = rows.get(site_of(node) or "")
            layer = layer_on_codes(node)
            if site is None or layer.bits != 2 * _HALF_BITS or not self._splits(site, layer):
                continue
            if site.path not in split:
                parts = stored_parts(program, node, layer)
                planes = _Planes(site.k, integer_zero_point=site.frozen_integer_zero)
                made = defer(planes, *parts, by_rows=True)
                tensors |= {f"{site.path}.{name}": tensor for name, tensor in made.items()}
                split[site.path] = site.k
                changes.append(Change(site.path, "8 bits to two planes of 4", "exact"))
            _rewrite(graph, node, layer, site.path, nodes)
        return PassResult(program.evolve(graph=graph, tensors=tensors), tuple(changes))

    def _splits(self, site: Site, layer: LayerOnCodes) -> bool:
        return site.frozen_integer_zero or (
            self.real_zero_points and isinstance(layer, GroupLinear)
        )

    def ensures(self, before: Program, after: Program) -> None:
        """Zero-points of planes are integers of 4 bits where those of the layer are integers."""
        integer = {site.path for site in after.plan if site.frozen_integer_zero}
        for node in after.graph.nodes:
            if node.target not in _LAYERS or not _is_plane(layer := layer_on_codes(node)):
                continue
            if str(layer.qweight.target).rsplit(".", 2)[0] not in integer:
                continue
            _, scale, offset = stored_parts(after, node, layer)
            if not holds(has_integer_zero_points(scale, offset, _HALF_BITS).all()):
                where = str(layer.qweight.target)
                raise PostconditionError("a plane's zero-point is not an integer code", where=where)


@dataclass(frozen=True)
class _Planes:
    """The tensors of both planes, by plane and name.

    Attributes:
        k: K.
        integer_zero_point: Whether −offset / scale are integers from 0 to 255.
    """

    k: int
    integer_zero_point: bool = True

    def __call__(self, qweight: Tensor, scale: Tensor, offset: Tensor) -> dict[str, Tensor]:
        codes = unpack_codes(qweight, 2 * _HALF_BITS, self.k)
        split = _integer_offsets if self.integer_zero_point else _real_offsets
        parts = zip(PLANE_NAMES, (codes % _STEP, codes // _STEP), split(scale, offset), strict=True)
        made = {}
        for plane, q, moved in parts:
            made[f"{plane}.qweight"] = pack_codes(q, _HALF_BITS)
            made[f"{plane}.scale"] = scale
            made[f"{plane}.offset"] = moved
        return made


def _integer_offsets(scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of the low and the high plane for z = z_low + 16 z_high of 4 bits each."""
    zero_point = (-offset.double() / scale.double()).round()
    high = (zero_point / _STEP).floor()
    low = zero_point - _STEP * high
    return (-scale.double() * low).to(scale.dtype), (-scale.double() * high).to(scale.dtype)


def _real_offsets(scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of both planes whose sum is exactly the layer's: see `SplitPlanes`."""
    high = -_MIDDLE * scale
    low = offset.double() - _STEP * high.double()
    exact = low.to(offset.dtype).double() == low
    zero = torch.zeros_like(high)
    return torch.where(exact, low.to(offset.dtype), offset), torch.where(exact, high, zero)


def _is_plane(layer: LayerOnCodes) -> bool:
    """Whether a layer is one of two planes."""
    planes = tuple(f".{plane}.qweight" for plane in PLANE_NAMES)
    return str(layer.qweight.target).endswith(planes)


def _rewrite(
    graph: fx.Graph, node: fx.Node, layer: LayerOnCodes, path: str, nodes: TensorNodes
) -> None:
    """Put the sum of two planes in the place of a layer."""
    planes: list[fx.Node] = []
    with graph.inserting_before(node):
        for plane in PLANE_NAMES:
            qweight, scale, offset = (nodes.get(f"{path}.{plane}.{name}") for name in CODE_NAMES)
            made = replace(layer, qweight=qweight, scale=scale, offset=offset, bits=_HALF_BITS)
            if planes and isinstance(made, GroupLinear):
                made = replace(made, bias=None)  # added once
            planes.append(made.insert(graph))
        total = graph.call_function(_ADD, tuple(planes), {"alpha": _STEP})
    move_site(node, total)
    node.replace_all_uses_with(total)
    erase_unread([node])
