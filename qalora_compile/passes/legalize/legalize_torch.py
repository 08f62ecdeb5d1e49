"""legalize-torch: torch's own kernel for 4-bit weights, with real-valued zeros."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional

from qalora_compile.errors import PostconditionError, UnsupportedError, UserInputError
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.lazy_tensor import defer, holds
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.int4_kernels import Int4packLinear
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.ir.packing.int4_layout import GROUPS, MIDDLE, ROW_UNIT, pack_int4
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import EXPERT_LINEAR, GROUP_LINEAR, stored_parts
from qalora_compile.ir.stages import ADAPTED, FOLDED, LEGALIZED, QUANTIZED
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.rewrite import TensorNodes
from qalora_compile.passes.legalize.base import add_bias, pad_input, require_float32
from qalora_compile.passes.legalize.block_layout import widen_groups
from qalora_compile.progress import track

_MAX_BITS = 4


class _Layout(NamedTuple):
    """How the groups of a weight are stored for the kernel.

    Attributes:
        bits, group_size, k, n: Of the layer; groups are at most K.
        width: Codes of a stored group: its own, rounded up to 32.
    """

    bits: int
    group_size: int
    k: int
    n: int
    width: int

    @classmethod
    def of(cls, layer: GroupLinear, k: int, n: int) -> _Layout:
        group_size = min(layer.group_size, k)
        unit = GROUPS[-1]
        return cls(layer.bits, group_size, k, n, -(-group_size // unit) * unit)

    @property
    def kernel_group(self) -> int:
        """The group size that the kernel is called with, which divides `width`."""
        return next(size for size in GROUPS if self.width % size == 0)

    @property
    def padded(self) -> bool:
        """Whether the stored groups together are longer than K."""
        return self.width * group_count(self.k, self.group_size) != self.k

    def describe(self) -> tuple[str, str]:
        """What the layer becomes, and how its stored form differs."""
        notes = ["exact"]
        if self.bits != _MAX_BITS:
            notes.append(f"codes of {self.bits} bits stored in {_MAX_BITS}")
        if self.padded:
            notes.append(f"groups of {self.group_size} padded to {self.width}")
        if self.n % ROW_UNIT:
            notes.append(f"{self.n} rows padded to a multiple of {ROW_UNIT}")
        return f"_weight_int4pack_mm_for_cpu, groups of {self.kernel_group}", "; ".join(notes)


@dataclass(frozen=True, kw_only=True)
class LegalizeTorch(Pass):
    """Rewrite every group_linear for `aten._weight_int4pack_mm_for_cpu`, which takes real zeros.

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 4, 32)
    After:   %1 = qalora.int4pack_linear(%x, @fc.packed, @fc.scale_and_zero, 32, 10)
             %2 = aten.add.Tensor(%1, @fc.bias)

    The kernel computes `scale · (q − 8) + zero`, so that `zero = offset + 8 · scale`. Codes of 2
    and 3 bits are stored in 4; those of 8 bits are two planes by now (`split-planes`).

    Fires on: every group_linear. Groups that are no multiple of 32 and tail groups are padded with
    x (`pad_groups`), rows are padded to a multiple of 16, and a group is stored as equal parts of
    256, 128, 64 or 32 with the same parameters.
    Leaves alone: group_embedding, which looks rows up in its own codes, so that a head on the codes
    of an embedding is stored a second time; adapters that were not folded.
    Exactness: exact in real arithmetic; zero is rounded once to float32, which moves a weight by no
    more than 2⁻²⁴ of |zero|.
    """

    name: ClassVar[str] = "legalize-torch"
    consumes: ClassVar[tuple[str, ...]] = (QUANTIZED, ADAPTED, FOLDED)
    produces: ClassVar[str | None] = f"{LEGALIZED}torch"

    def requires(self, program: Program) -> None:
        """The model computes in float32, in layers of at most 4 bits that are not experts.

        Raises:
            UnsupportedError: it has stacked experts, or computes in float64.
            PreconditionError: it computes in half precision, and was not widened.
        """
        require_float32(program, "torch's kernel for 4-bit weights")
        for node in program.graph.nodes:
            wide = node.target is GROUP_LINEAR and GroupLinear.of(node).bits > _MAX_BITS
            if node.target is EXPERT_LINEAR or wide:
                raise UnsupportedError(
                    "a layer of 8 bits is not split into planes"
                    if wide
                    else "stacked experts have no form in target torch",
                    where=site_of(node) or node.name,
                    hint="run split-planes{real-zero-points=true} before"
                    if wide
                    else "targets ort and openvino hold them",
                )

    def call(self, program: Program) -> PassResult:
        """Legalize."""
        graph, tensors = program.copy_graph(), program.tensors()
        nodes, changes, made = TensorNodes(graph), [], set[str]()
        for node in track([n for n in graph.nodes if n.target is GROUP_LINEAR], "legalize"):
            layer = GroupLinear.of(node)
            parts = stored_parts(program, node, layer)
            path = str(layer.qweight.target).removesuffix(".qweight")
            layout = _Layout.of(layer, _width(program, node), parts[1].shape[0])
            if path not in made:
                made.add(path)
                lowered = defer(partial(_lower, layout=layout), *parts)
                tensors |= {f"{path}.{name}": tensor for name, tensor in lowered.items()}
                changes.append(Change(path, *layout.describe()))
            stored = (nodes.get(f"{path}.packed"), nodes.get(f"{path}.scale_and_zero"))
            _rewrite(graph, node, layer, layout, stored)
        return PassResult(program.evolve(graph=graph, tensors=tensors), tuple(changes))

    def ensures(self, before: Program, after: Program) -> None:
        """No layer is left."""
        for node in after.graph.nodes:
            if node.target is GROUP_LINEAR:
                raise PostconditionError("a layer was not legalized", where=site_of(node))


def _width(program: Program, node: fx.Node) -> int:
    """K of a layer, whose site may be marked on a sum with an adapter or another plane."""
    name = site_of(node)
    while name is None:
        node = next(iter(node.users))
        name = site_of(node)
    return program.plan[name].k


def _lower(qweight: Tensor, scale: Tensor, offset: Tensor, *, layout: _Layout) -> dict[str, Tensor]:
    """`packed` `[N', K' / 2]` uint8 and `scale_and_zero` `[K' / g, N', 2]` float32.

    Raises:
        UserInputError: a zero is beyond float32.
    """
    codes = unpack_codes(qweight, layout.bits, layout.k)
    codes = widen_groups(codes, layout.group_size, layout.width)
    rows = (0, 0, 0, -layout.n % ROW_UNIT)
    zero = offset.double() + MIDDLE * scale.double()
    pair = torch.stack([scale.double(), zero]).float()
    if not holds(torch.isfinite(pair).all()):
        raise UserInputError("a zero-point is beyond float32", hint="target ort may hold it")
    pair = functional.pad(pair.repeat_interleave(layout.width // layout.kernel_group, dim=2), rows)
    packed = pack_int4(functional.pad(codes, rows))
    return {"packed": packed, "scale_and_zero": pair.permute(2, 1, 0).contiguous()}


def _rewrite(
    graph: fx.Graph,
    node: fx.Node,
    layer: GroupLinear,
    layout: _Layout,
    stored: tuple[fx.Node, fx.Node],
) -> None:
    with graph.inserting_before(node):
        x = pad_input(graph, layer.x, layout.group_size, layout.width, layout.padded)
        y = Int4packLinear.create(graph, x, *stored, layout.kernel_group, layout.n)
        y = add_bias(graph, y, layer.bias)
    move_site(node, y)
    node.replace_all_uses_with(y)
    erase_unread([node])
