"""What a program of each stage may contain, and `validate`, which checks it.

The specification is data: the operators of this package that a stage admits. ATen operators are
legal everywhere. `validate` runs around every pass in the tests (`framework.base.validating`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx

from qalora_compile.errors import InternalError
from qalora_compile.ir import ops
from qalora_compile.ir.adapters.added import AddedAdapter
from qalora_compile.ir.adapters.affine import AffineAdapter
from qalora_compile.ir.adapters.find import adapter_at
from qalora_compile.ir.affine import group_count, has_integer_zero_points
from qalora_compile.ir.lazy_tensor import holds
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.affine_linear import AffineLinear
from qalora_compile.ir.ops.embedding import GroupEmbedding
from qalora_compile.ir.ops.experts import ExpertLinear
from qalora_compile.ir.ops.integer_zero_linear import IntegerZeroLinear
from qalora_compile.ir.ops.linear import GroupLinear, LinearOnCodes
from qalora_compile.ir.ops.views import arguments
from qalora_compile.ir.packing.bitstream import packed_width
from qalora_compile.ir.pattern import get_tensor
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import QUANTIZE
from qalora_compile.ir.stages import ADAPTED, ANNOTATED, FLOAT, FOLDED, LEGALIZED, QUANTIZED, STAGES
from qalora_compile.ir.tensor_identity import is_finite
from qalora_compile.ir.torch_internals import OpOverload

LayerOnCodes = GroupLinear | ExpertLinear | GroupEmbedding
_OnCodes = LayerOnCodes | LinearOnCodes
QALORA = torch.ops.qalora
GROUP_LINEAR = QALORA.group_linear.default
GROUP_SUM = QALORA.group_sum.default
POOLED_ADAPTER = QALORA.pooled_adapter.default
ADAPTED_LINEAR = QALORA.adapted_linear.default
"""GROUP_LINEAR fused with its POOLED_ADAPTER: only in what training runs, at no stage."""
AFFINE_LINEAR = QALORA.affine_linear.default
INTEGER_ZERO_LINEAR = QALORA.integer_zero_linear.default
PAD_GROUPS = QALORA.pad_groups.default
MATMUL_NBITS = QALORA.matmul_nbits.default
EXPERT_LINEAR = QALORA.expert_linear.default
EXPERT_ADAPTER = QALORA.expert_adapter.default
EXPERT_MATMUL_NBITS = QALORA.expert_matmul_nbits.default
GROUP_QUANT_LINEAR = QALORA.group_quant_linear.default
EXPERT_GROUP_QUANT_LINEAR = QALORA.expert_group_quant_linear.default
MATMUL_BLOCKS = QALORA.matmul_blocks.default
EXPERT_MATMUL_BLOCKS = QALORA.expert_matmul_blocks.default
GROUP_EMBEDDING = QALORA.group_embedding.default
BLOCK_EMBEDDING = QALORA.block_embedding.default
FLAT_EMBEDDING = QALORA.flat_embedding.default
INT4PACK_LINEAR = QALORA.int4pack_linear.default
RMS_NORM = QALORA.rms_norm.default
ROTARY_EMBEDDING = QALORA.rotary_embedding.default
ATTENTION = QALORA.attention.default
SKIP_RMS_NORM = QALORA.skip_rms_norm.default
MULTI_HEAD_ATTENTION = QALORA.multi_head_attention.default
JOIN_GROUPS = QALORA.join_groups.default
SPLIT_GROUPS = QALORA.split_groups.default
FUSED = frozenset(
    {RMS_NORM, ROTARY_EMBEDDING, ATTENTION, SKIP_RMS_NORM, MULTI_HEAD_ATTENTION}
    | {JOIN_GROUPS, SPLIT_GROUPS}
)
"""Legal at every stage."""
ON_CODES = frozenset({GROUP_LINEAR, EXPERT_LINEAR})
ADAPTERS = frozenset({POOLED_ADAPTER, EXPERT_ADAPTER})
_COMMON = ADAPTERS | {GROUP_SUM, PAD_GROUPS}  # of lowered programs

LEGAL_OPS: dict[str, frozenset[object]] = {
    FLOAT: frozenset(),
    ANNOTATED: frozenset(),
    QUANTIZED: ON_CODES | {GROUP_EMBEDDING},
    ADAPTED: ON_CODES | ADAPTERS | {INTEGER_ZERO_LINEAR, AFFINE_LINEAR, GROUP_SUM, GROUP_EMBEDDING},
    FOLDED: ON_CODES | {GROUP_EMBEDDING},
    f"{LEGALIZED}ort": _COMMON | {GROUP_QUANT_LINEAR, EXPERT_GROUP_QUANT_LINEAR, BLOCK_EMBEDDING},
    f"{LEGALIZED}ort-stock": _COMMON | {MATMUL_NBITS, EXPERT_MATMUL_NBITS, BLOCK_EMBEDDING},
    f"{LEGALIZED}onnx": _COMMON | {MATMUL_BLOCKS, EXPERT_MATMUL_BLOCKS, FLAT_EMBEDDING},
    f"{LEGALIZED}openvino": _COMMON
    | {GROUP_QUANT_LINEAR, EXPERT_GROUP_QUANT_LINEAR, BLOCK_EMBEDDING},
    f"{LEGALIZED}torch": _COMMON | {INT4PACK_LINEAR, GROUP_EMBEDDING},
}
"""Operators of the `qalora` namespace that a program of each stage may call."""


def _legal_ops(stage: str) -> frozenset[object]:
    """The operators of this package at a stage; for the target of an extension, those of all."""
    if stage in LEGAL_OPS:
        return LEGAL_OPS[stage] | FUSED
    if not stage.startswith(LEGALIZED):
        raise InternalError(f"unknown stage {stage!r}", hint=f"stages: {STAGES}")
    lowered = (ops for name, ops in LEGAL_OPS.items() if name.startswith(LEGALIZED))
    return FUSED.union(*lowered)


def is_qalora(node: fx.Node) -> bool:
    """Whether the node calls an operator of this package."""
    return isinstance(node.target, OpOverload) and (node.target.namespace == ops.linear.NAMESPACE)


def stored_tensor(program: Program, node: fx.Node, operand: object) -> Tensor:
    """The tensor behind an operand of `node` that is a `get_attr`.

    Raises:
        InternalError: the operand is computed, or the tensor is missing.
    """
    tensor = None
    if isinstance(operand, fx.Node) and operand.op == "get_attr":
        tensor = get_tensor(program.module, str(operand.target))
    if tensor is None:
        raise _broken(node, f"the operand {operand} is not a stored tensor")
    return tensor


def validate(program: Program) -> None:
    """Check a program against the specification of its stage.

    The graph must be well formed and hold only operators that are legal at the stage; the tensors
    of each of our operators must be finite and agree in shape and dtype; every quantized row of the
    plan must have its node; and from `quantized` on only adapters may be trainable.

    Raises:
        InternalError: a condition is broken; the node and its site are named.
    """
    legal = _legal_ops(program.stage)
    program.graph.lint()
    for node in program.graph.nodes:
        if is_qalora(node):
            if node.target not in legal:
                raise _broken(node, f"{node.target} is not legal at stage {program.stage}")
            check = _CHECKS.get(node.target)
            if check is not None:
                check(program, node)
    _check_sites(program)
    if program.stage not in (FLOAT, ANNOTATED):
        _check_trainable(program)


def _broken(node: fx.Node, what: str) -> InternalError:
    site = site_of(node)
    return InternalError(what, where=f"node {node.name}" + (f", site {site}" if site else ""))


def layer_on_codes(node: fx.Node) -> LayerOnCodes:
    """The operands of a layer on packed codes.

    Raises:
        InternalError: the node is not one.
    """
    if node.target is EXPERT_LINEAR:
        return ExpertLinear.of(node)
    return GroupEmbedding.of(node) if node.target is GROUP_EMBEDDING else GroupLinear.of(node)


def stored_parts(program: Program, node: fx.Node, layer: _OnCodes) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and offset of a layer on packed codes.

    Raises:
        InternalError: see `stored_tensor`.
    """
    qweight, scale, offset = (
        stored_tensor(program, node, operand)
        for operand in (layer.qweight, layer.scale, layer.offset)
    )
    return qweight, scale, offset


def _check_layer(program: Program, node: fx.Node) -> None:
    _check_on_codes(program, node, layer_on_codes(node))


def _check_on_codes(program: Program, node: fx.Node, layer: _OnCodes) -> None:
    qweight, scale, offset = stored_parts(program, node, layer)
    if qweight.dtype != torch.uint8 or offset.shape != scale.shape or offset.dtype != scale.dtype:
        raise _broken(node, "codes, scale and offset disagree in shape or dtype")
    bias = layer.bias if isinstance(layer, GroupLinear) else None
    if bias is not None and bias.op == "get_attr":
        stored = stored_tensor(program, node, bias)
        if tuple(stored.shape) != (scale.shape[0],):
            raise _broken(node, f"the bias is {list(stored.shape)}, not [{scale.shape[0]}]")
    site = site_of(node)
    if site is not None:
        row = program.plan[site]
        lead = (row.experts, row.n) if row.experts else (row.n,)
        groups = group_count(row.k, layer.group_size)
        want = (*lead, packed_width(row.k, layer.bits)), (*lead, groups)
        if (tuple(qweight.shape), tuple(scale.shape)) != want:
            raise _broken(
                node, f"codes {list(qweight.shape)} and scale {list(scale.shape)}, not {want}"
            )
        if row.has_integer_zero_point and not holds(
            has_integer_zero_points(scale, offset, layer.bits).all()
        ):
            raise _broken(node, f"a zero-point is not an integer from 0 to {2**layer.bits - 1}")
    for name, tensor in (("scale", scale), ("offset", offset)):
        if not is_finite(tensor):
            raise _broken(node, f"{name} holds NaN or infinite values")


def _check_adapter(program: Program, node: fx.Node) -> None:
    adapter = adapter_at(node)
    assert isinstance(adapter, AddedAdapter), "by the table of checks"
    lora_a, lora_b = (stored_tensor(program, node, operand) for operand in adapter.trained)
    rank = 2 if node.target is POOLED_ADAPTER else 3
    if not (lora_a.dim() == lora_b.dim() == rank and lora_a.shape[-2] == lora_b.shape[-1]):
        raise _broken(node, f"A {list(lora_a.shape)} and B {list(lora_b.shape)} do not chain")
    pooled = adapter.pooled
    site = next((s for s in map(site_of, node.users) if s is not None), None)
    if site is None or pooled is None:
        return  # another pattern: fold-adapters refuses it, other passes need not understand it
    row = program.plan[site]
    want = (group_count(row.k, pooled.group_size), row.n)
    if (lora_a.shape[-1], lora_b.shape[-2]) != want:
        raise _broken(
            node, f"A has {lora_a.shape[-1]} groups and B {lora_b.shape[-2]} rows: {want}"
        )


def _check_integer_zero_linear(program: Program, node: fx.Node) -> None:
    layer = IntegerZeroLinear.of(node)
    _check_on_codes(program, node, layer)
    scale, lora_a, lora_b = (
        stored_tensor(program, node, operand)
        for operand in (layer.scale, layer.lora_A, layer.lora_B)
    )
    chained = lora_a.dim() == lora_b.dim() == 2 and lora_a.shape[0] == lora_b.shape[1]
    if not chained or (lora_b.shape[0], lora_a.shape[1]) != tuple(scale.shape):
        raise _broken(node, f"A {list(lora_a.shape)} and B {list(lora_b.shape)} do not chain")


def _check_affine_linear(program: Program, node: fx.Node) -> None:
    layer = AffineLinear.of(node)
    _check_on_codes(program, node, layer)
    scale = stored_tensor(program, node, layer.scale)
    parts = (stored_tensor(program, node, operand) for operand in AffineAdapter(node).trained)
    lora_a, lora_b, *moved = (tuple(part.shape) for part in parts)
    row = program.plan[site_of(node) or ""]
    n, groups = row.n, group_count(row.k, layer.pool)
    if layer.pool % layer.group_size or (lora_b, lora_a) != ((n, lora_a[0]), (lora_b[1], groups)):
        raise _broken(node, f"A {list(lora_a)} and B {list(lora_b)} do not chain")
    if moved != [tuple(scale.shape), (n, row.k)][: len(moved)]:
        raise _broken(node, f"gain and shift {moved} do not fit {n} rows of {row.k}")


def _each_matrix(
    codes: str, block: str, check: Callable[[fx.Node, int, int, Tensor, Tensor, Tensor], None]
) -> Callable[[Program, fx.Node], None]:
    """Make a check of a kernel's codes, scale and zero-point from the check of one matrix.

    For experts each of the three is a list, and the tensors of every expert are checked.

    Args:
        codes: Name of the operand that holds the codes.
        block: Name of the operand that is the width of a block or group.
        check: The check of one matrix, which also takes bits and block size.
    """

    def run(program: Program, node: fx.Node) -> None:
        own = arguments(node)
        operands = [own[codes], own["scale"], own["zero_point"]]
        lists = [list(o) if isinstance(o, (list, tuple)) else [o] for o in operands]
        for each in zip(*lists, strict=True):
            packed, scale, zero_point = (stored_tensor(program, node, o) for o in each)
            check(node, own["bits"], own[block], packed, scale, zero_point)

    return run


def _check_groups(
    node: fx.Node, bits: int, group_size: int, codes: Tensor, scale: Tensor, zero_point: Tensor
) -> None:
    n, groups, width = codes.shape
    if bits not in (2, 3, 4, 8) or group_size < 16 or group_size % 16:
        raise _broken(node, f"GroupQuantLinear does not take {bits} bits in groups of {group_size}")
    if codes.dtype != torch.uint8 or width != group_size * bits // 8:
        raise _broken(node, f"the codes are {codes.dtype} {list(codes.shape)}")
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tuple(tensor.shape) != (n, groups) or tensor.dtype != scale.dtype:
            raise _broken(node, f"{name} is {tensor.dtype} {list(tensor.shape)}")
        if not is_finite(tensor):
            raise _broken(node, f"{name} holds NaN or infinite values")


def _check_flat(
    node: fx.Node, bits: int, block_size: int, codes: Tensor, scale: Tensor, zero_point: Tensor
) -> None:
    blocks, n = scale.shape
    if bits not in (2, 4, 8) or block_size < 1:
        raise _broken(node, f"DequantizeLinear does not take {bits} bits in blocks of {block_size}")
    least = ops.target_kernels.flat_width(((blocks - 1) * block_size + 1) * n, bits)
    most = ops.target_kernels.flat_width(blocks * block_size * n, bits)
    if codes.dtype != torch.uint8 or not least <= codes.numel() <= most:
        raise _broken(node, "codes and scale disagree in shape")
    if tuple(zero_point.shape) != (ops.target_kernels.flat_width(blocks * n, bits),):
        raise _broken(node, f"zero_point is {zero_point.dtype} {list(zero_point.shape)}")
    if not is_finite(scale):
        raise _broken(node, "scale holds NaN or infinite values")


def _check_blocks(
    node: fx.Node, bits: int, block_size: int, qweight: Tensor, scale: Tensor, zero_point: Tensor
) -> None:
    n, blocks, width = qweight.shape
    if bits not in (2, 4, 8) or block_size < 16 or block_size & (block_size - 1):
        raise _broken(node, f"MatMulNBits does not take {bits} bits in blocks of {block_size}")
    if width != block_size * bits // 8 or tuple(scale.shape) != (n, blocks):
        raise _broken(node, "codes and scale disagree in shape")
    if not is_finite(scale):
        raise _broken(node, "scale holds NaN or infinite values")
    if zero_point.dtype != torch.uint8 or tuple(zero_point.shape) != (n, -(-blocks * bits // 8)):
        raise _broken(node, f"zero_point is {zero_point.dtype} {list(zero_point.shape)}")


_NBITS = _each_matrix("qweight", "block_size", _check_blocks)
_GROUPS = _each_matrix("codes", "group_size", _check_groups)
_FLAT = _each_matrix("codes", "block_size", _check_flat)
_CHECKS: dict[object, Callable[[Program, fx.Node], None]] = {
    GROUP_LINEAR: _check_layer,
    EXPERT_LINEAR: _check_layer,
    GROUP_EMBEDDING: _check_layer,
    POOLED_ADAPTER: _check_adapter,
    INTEGER_ZERO_LINEAR: _check_integer_zero_linear,
    AFFINE_LINEAR: _check_affine_linear,
    EXPERT_ADAPTER: _check_adapter,
    MATMUL_NBITS: _NBITS,
    EXPERT_MATMUL_NBITS: _NBITS,
    GROUP_QUANT_LINEAR: _GROUPS,
    EXPERT_GROUP_QUANT_LINEAR: _GROUPS,
    MATMUL_BLOCKS: _FLAT,
    EXPERT_MATMUL_BLOCKS: _FLAT,
}


def _check_sites(program: Program) -> None:
    marked = Counter(s for s in map(site_of, program.graph.nodes) if s is not None)
    for name, count in marked.items():
        if count > 1:
            raise InternalError(f"the site {name} is computed by {count} nodes")
    known = {site.name for site in program.plan}
    for name in marked.keys() - known:
        raise InternalError(f"a node computes the site {name}, which is not in the plan")
    for site in program.plan:
        if site.decision == QUANTIZE and site.name not in marked:
            raise InternalError(f"no node computes the site {site.name}")


def _check_trainable(program: Program) -> None:
    adapters = dict(program.named_adapter_parameters())
    if bool(adapters) and _legal_ops(program.stage).isdisjoint(ADAPTERS):
        raise InternalError(f"adapters are left at stage {program.stage}")
    for name, parameter in program.module.named_parameters():
        if parameter.requires_grad != (name in adapters):
            raise InternalError(f"{name} is {'' if parameter.requires_grad else 'not '}trainable")
