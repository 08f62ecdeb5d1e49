"""legalize-ort-stock: MatMulNBits with integer zero-points, and a group-sum correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional

from qalora_compile.errors import (
    PostconditionError,
    PreconditionError,
    UnsupportedError,
    UserInputError,
)
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.packing import pack_codes, unpack_codes
from qalora_compile.ir.plan import Site
from qalora_compile.ir.program import ADAPTED, FOLDED, LEGALIZED, QUANTIZED, Program
from qalora_compile.ir.spec import (
    EXPERT_LINEAR,
    EXPERT_MATMUL_NBITS,
    GROUP_SUM,
    MATMUL_NBITS,
    ON_CODES,
    SPREAD_GROUPS,
    tensor_argument,
)
from qalora_compile.passes.base import Change, Pass, PassResult
from qalora_compile.passes.rewrite import TensorNodes
from qalora_compile.progress import track

_ATEN = torch.ops.aten
_MIN_BLOCK = 16
_MAX_BLOCK = 256  # blocks of 512 and more gave zeros in ONNX Runtime up to 1.26


@dataclass(frozen=True)
class BlockLayout:
    """How groups of a weight are laid out as MatMulNBits blocks.

    Attributes:
        bits: Width of the stored codes: 2, 4 or 8.
        block_size: A power of two from 16 to 256.
        width: Stored codes per group; more than the group size where groups are padded.
        spread: Groups are padded, so x must be spread alike.
    """

    bits: int
    block_size: int
    width: int
    spread: bool

    @classmethod
    def choose(cls, *, bits: int, group_size: int, k: int, accuracy_level: int) -> BlockLayout:
        """The layout for a weight of `k` columns.

        3-bit codes are stored in 4 bits, there being no 3-bit kernel; so are 2-bit codes at
        accuracy level 0, where the 2-bit kernel is about 100 times slower than the 4-bit one.
        """
        stored = 4 if bits == 3 or (bits == 2 and accuracy_level == 0) else bits
        width = -(-group_size // _MIN_BLOCK) * _MIN_BLOCK
        block = min(width & -width, _MAX_BLOCK)
        return cls(stored, block, width, width != group_size and k > group_size)


@dataclass(frozen=True, kw_only=True)
class LegalizeOrtStock(Pass):
    """Rewrite every group_linear for stock ONNX Runtime, whose kernels take integer zero-points.

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 4, 32)
    After:   %1 = qalora.matmul_nbits(%x, @fc.qweight, @fc.scale, @fc.zero_point, @fc.bias, 4, 32, 0)
             %2 = qalora.group_sum(%x, 32)
             %3 = aten.matmul(%2, @fc.correction)
             %4 = aten.add.Tensor(%1, %3)

    with `zero_point = clamp(round(−offset / scale))` and `correction = (offset + scale ·
    zero_point)ᵀ`, `[L, N]`, left out where it is zero throughout.

    Fires on: every group_linear, and every expert_linear, which becomes one
    `qalora.expert_matmul_nbits`; group sizes that no kernel takes are padded (`spread_groups`).
    Leaves alone: adapters that were not folded.
    Exactness: exact in real arithmetic for any group size, tail, scale and offset; the correction
    is rounded once to float32.

    Options:
        accuracy_level: As `ExportSpec.accuracy_level`.
    """

    name: ClassVar[str] = "legalize-ort-stock"
    consumes: ClassVar[tuple[str, ...]] = (QUANTIZED, ADAPTED, FOLDED)
    produces: ClassVar[str | None] = f"{LEGALIZED}ort-stock"

    accuracy_level: int = 0

    def __post_init__(self) -> None:
        if self.accuracy_level not in (0, 4) or isinstance(self.accuracy_level, bool):
            raise UserInputError(f"accuracy_level is {self.accuracy_level!r}", hint="use 0 or 4")

    def requires(self, program: Program) -> None:
        """The model computes in float32, as the kernels do.

        Raises:
            UnsupportedError: it computes in float64, for which there is no kernel.
            PreconditionError: it computes in half precision, and was not widened.
        """
        for site in program.plan.to_quantize():
            if site.dtype == "float64":
                raise UnsupportedError(
                    "MatMulNBits has no float64 kernel",
                    where=site.name,
                    hint="capture model.float() to export",
                )
            if site.dtype != "float32":
                raise PreconditionError(
                    f"the layer computes in {site.dtype}",
                    where=site.name,
                    hint="run widen-halves before: it computes the same weights in float32",
                )

    def call(self, program: Program) -> PassResult:
        """Legalize."""
        graph = program.copy_graph()
        rows = {site.name: site for site in program.plan}
        tensors = program.tensors()
        linears = {n: rows[_site_name(n)] for n in graph.nodes if n.target in ON_CODES}
        weights = {site.path: (node, site) for node, site in linears.items()}
        changes, lowered = [], dict[str, dict[str, Tensor]]()
        for node, site in track(list(weights.values()), "legalize"):
            bits, group_size, layout = self._layout(node, site)
            qweight, scale, offset = (tensor_argument(program, node, i) for i in (1, 2, 3))
            lower = _lower_experts if site.experts else lower_weight
            lowered[site.path] = lower(qweight, scale, offset, bits, group_size, site.k, layout)
            changes.append(_describe(site, bits, group_size, layout))
        nodes = TensorNodes(graph)
        for node, site in linears.items():
            layout = self._layout(node, site)[2]
            self._rewrite(graph, node, site, layout, nodes, lowered[site.path])
        for path, stored in lowered.items():
            tensors |= {f"{path}.{name}": tensor for name, tensor in stored.items()}
        return PassResult(program.evolve(graph=graph, tensors=tensors), tuple(changes))

    def ensures(self, before: Program, after: Program) -> None:
        """No group_linear or expert_linear is left."""
        for node in after.graph.nodes:
            if node.target in ON_CODES:
                raise PostconditionError("a layer was not legalized", where=site_of(node))

    def _layout(self, node: fx.Node, site: Site) -> tuple[int, int, BlockLayout]:
        """Bits and group size of a quantized layer, and the blocks to store it in."""
        bits, group_size = node.args[5], node.args[6]
        assert isinstance(bits, int) and isinstance(group_size, int)
        return (
            bits,
            group_size,
            BlockLayout.choose(
                bits=bits, group_size=group_size, k=site.k, accuracy_level=self.accuracy_level
            ),
        )

    def _rewrite(
        self,
        graph: fx.Graph,
        node: fx.Node,
        site: Site,
        layout: BlockLayout,
        nodes: TensorNodes,
        parts: dict[str, Tensor],
    ) -> None:
        x, last, group_size = node.args[0], node.args[4], node.args[6]
        assert isinstance(x, fx.Node)
        corrected = any(name.endswith("correction") for name in parts)
        stored = [
            _operand(site, name, nodes)
            for name in ("qweight", "scale", "zero_point", *(["correction"] if corrected else []))
        ]
        options = (layout.bits, layout.block_size, self.accuracy_level)
        with graph.inserting_before(node):
            spread = x
            if layout.spread:
                spread = graph.call_function(SPREAD_GROUPS, (x, group_size, layout.width))
            sums = graph.call_function(GROUP_SUM, (x, group_size)) if corrected else None
            if node.target is EXPERT_LINEAR:
                operands = (spread, sums, *stored[:3], stored[3] if corrected else [], last)
                y = graph.call_function(EXPERT_MATMUL_NBITS, (*operands, *options))
            else:
                y = graph.call_function(MATMUL_NBITS, (spread, *stored[:3], last, *options))
                if sums is not None:
                    moved = graph.call_function(_ATEN.matmul.default, (sums, stored[3]))
                    y = graph.call_function(_ATEN.add.Tensor, (y, moved))
        move_site(node, y)
        node.replace_all_uses_with(y)
        erase_unread([node])


def lower_weight(
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    group_size: int,
    k: int,
    layout: BlockLayout,
) -> dict[str, Tensor]:
    """Tensors of MatMulNBits and its correction from packed codes, scale and offset.

    Returns:
        `qweight` `[N, Lb, block_size · bits / 8]` uint8; `scale` `[N, Lb]` float32; `zero_point`
        `[N, ceil(Lb · bits / 8)]` uint8; `correction` `[L, N]` float32 unless it is all zero.
    """
    n, groups = scale.shape
    wide_scale, wide_offset = scale.double(), offset.double()
    ratio = torch.where(wide_scale == 0, 0.0, -wide_offset / wide_scale)
    zero_point = ratio.round().clamp(0, 2**layout.bits - 1)
    correction = (wide_offset + wide_scale * zero_point).t()
    codes = unpack_codes(qweight, bits, k)
    if layout.spread:
        codes = functional.pad(codes, (0, groups * group_size - k)).unflatten(1, (groups, -1))
        codes = functional.pad(codes, (0, layout.width - group_size)).flatten(1)
    span = layout.width if layout.spread or groups == 1 else group_size
    blocks = group_count(codes.shape[1], layout.block_size)
    codes = functional.pad(codes, (0, blocks * layout.block_size - codes.shape[1]))
    group_of_block = torch.arange(blocks) * layout.block_size // span
    zero_codes = zero_point[:, group_of_block].to(torch.uint8)
    width = -(-blocks * layout.bits // 8)
    lowered = {
        "qweight": pack_codes(codes, layout.bits).reshape(n, blocks, -1),
        "scale": scale[:, group_of_block].float().contiguous(),
        "zero_point": pack_codes(zero_codes, layout.bits)[:, :width].contiguous(),
    }
    stored = correction.float().contiguous()
    return lowered | ({"correction": stored} if bool(stored.any()) else {})


def _lower_experts(
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    group_size: int,
    k: int,
    layout: BlockLayout,
) -> dict[str, Tensor]:
    """`lower_weight` of each expert, named `0.qweight` and so on: a kernel's weights are its own.

    Where one expert needs a correction, all have one.
    """
    each = [
        lower_weight(*parts, bits, group_size, k, layout)
        for parts in zip(qweight, scale, offset, strict=True)
    ]
    if any("correction" in parts for parts in each):
        none = scale.new_zeros(scale.shape[2], scale.shape[1], dtype=torch.float32)
        each = [{"correction": none} | parts for parts in each]
    return {f"{e}.{name}": tensor for e, parts in enumerate(each) for name, tensor in parts.items()}


def _operand(site: Site, name: str, nodes: TensorNodes) -> fx.Node | list[fx.Node]:
    """The node of a lowered tensor; for experts the nodes of all of them."""
    if not site.experts:
        return nodes.get(f"{site.path}.{name}")
    return [nodes.get(f"{site.path}.{expert}.{name}") for expert in range(site.experts)]


def _site_name(node: fx.Node) -> str:
    """Name of the site that a group_linear belongs to; an adapter may stand between them."""
    name = site_of(node)
    if name is None:
        name = next((s for s in map(site_of, node.users) if s is not None), None)
    if name is None:
        raise PostconditionError("a quantized layer belongs to no site", where=f"node {node.name}")
    return name


def _describe(site: Site, bits: int, group_size: int, layout: BlockLayout) -> Change:
    why = "exact"
    if layout.bits != bits:
        why = f"{bits}-bit codes stored in {layout.bits} bits: no fast kernel for {bits}"
    if layout.spread:
        why += f"; groups of {group_size} padded to {layout.width}: no kernel for {group_size}"
    return Change(site.path, f"MatMulNBits, {layout.bits} bits, blocks of {layout.block_size}", why)
