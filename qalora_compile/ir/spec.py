"""What a program of each stage may contain, and `validate`, which checks it.

The specification is data: the operators of this package that a stage admits. ATen operators are
legal everywhere. `validate` runs around every pass in the tests (`passes.base.validating`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx

from qalora_compile.errors import InternalError
from qalora_compile.ir import ops
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.packing import packed_width
from qalora_compile.ir.pattern import get_tensor
from qalora_compile.ir.plan import QUANTIZE
from qalora_compile.ir.program import (
    ADAPTED,
    ADAPTER_NAMES,
    ANNOTATED,
    FLOAT,
    FOLDED,
    LEGALIZED,
    QUANTIZED,
    STAGES,
    Program,
)
from qalora_compile.ir.storage import is_finite

QALORA = torch.ops.qalora
GROUP_LINEAR = QALORA.group_linear.default
GROUP_SUM = QALORA.group_sum.default
POOLED_ADAPTER = QALORA.pooled_adapter.default
SPREAD_GROUPS = QALORA.spread_groups.default
MATMUL_NBITS = QALORA.matmul_nbits.default

LEGAL_OPS: dict[str, frozenset[object]] = {
    FLOAT: frozenset(),
    ANNOTATED: frozenset(),
    QUANTIZED: frozenset({GROUP_LINEAR}),
    ADAPTED: frozenset({GROUP_LINEAR, GROUP_SUM, POOLED_ADAPTER}),
    FOLDED: frozenset({GROUP_LINEAR}),
    f"{LEGALIZED}ort-stock": frozenset({MATMUL_NBITS, GROUP_SUM, SPREAD_GROUPS, POOLED_ADAPTER}),
}
"""Operators of the `qalora` namespace that a program of each stage may call."""


def is_qalora(node: fx.Node) -> bool:
    """Whether the node calls an operator of this package."""
    return isinstance(node.target, torch._ops.OpOverload) and (
        node.target.namespace == ops.NAMESPACE
    )


def tensor_argument(program: Program, node: fx.Node, position: int) -> Tensor:
    """The tensor that a node reads directly, through `get_attr`, at an argument position.

    Raises:
        InternalError: the argument is computed, or the tensor is missing.
    """
    source = node.args[position]
    tensor = None
    if isinstance(source, fx.Node) and source.op == "get_attr":
        tensor = get_tensor(program.module, str(source.target))
    if tensor is None:
        raise _broken(node, f"argument {position} ({source}) is not a stored tensor")
    return tensor


def validate(program: Program) -> None:
    """Check a program against the specification of its stage.

    Checks that the graph is well formed, that only operators legal at the stage occur, that the
    tensors of each of our operators agree in shape and dtype and are finite, that every quantized
    row of the plan has its node, and that, from `quantized` on, adapters alone are trainable.

    Raises:
        InternalError: one of these is broken; the node and its site are named.
    """
    if program.stage not in LEGAL_OPS:
        raise InternalError(f"unknown stage {program.stage!r}", hint=f"stages: {STAGES}")
    program.graph.lint()
    legal = LEGAL_OPS[program.stage]
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


def _check_group_linear(program: Program, node: fx.Node) -> None:
    qweight, scale, offset = (tensor_argument(program, node, i) for i in (1, 2, 3))
    bits, group_size = node.args[5], node.args[6]
    assert isinstance(bits, int)
    assert isinstance(group_size, int)
    n, groups = scale.shape
    if qweight.dtype != torch.uint8 or offset.shape != scale.shape or offset.dtype != scale.dtype:
        raise _broken(node, "codes, scale and offset disagree in shape or dtype")
    bias = node.args[4]
    if isinstance(bias, fx.Node) and bias.op == "get_attr":
        stored = tensor_argument(program, node, 4)
        if tuple(stored.shape) != (n,):
            raise _broken(node, f"the bias is {list(stored.shape)}, not [{n}]")
    site = site_of(node)
    if site is not None:
        row = program.plan[site]
        want = (row.n, packed_width(row.k, bits), group_count(row.k, group_size))
        if (n, qweight.shape[1], groups) != want or qweight.shape[0] != n:
            raise _broken(node, f"packed [N, bytes] and L are {(n, *qweight.shape[1:], groups)}")
    for name, tensor in (("scale", scale), ("offset", offset)):
        if not is_finite(tensor):
            raise _broken(node, f"{name} holds NaN or infinite values")


def _check_adapter(program: Program, node: fx.Node) -> None:
    lora_a, lora_b = tensor_argument(program, node, 1), tensor_argument(program, node, 2)
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise _broken(node, f"A {list(lora_a.shape)} and B {list(lora_b.shape)} do not chain")
    pooled = node.args[0]
    site = next((s for s in map(site_of, node.users) if s is not None), None)
    if site is None or not isinstance(pooled, fx.Node) or pooled.target is not GROUP_SUM:
        return  # another form: fold-adapters refuses it, other passes need not understand it
    row, pool = program.plan[site], pooled.args[1]
    assert isinstance(pool, int)
    want = (group_count(row.k, pool), row.n)
    if (lora_a.shape[1], lora_b.shape[0]) != want:
        raise _broken(node, f"A has {lora_a.shape[1]} groups and B {lora_b.shape[0]} rows: {want}")


def _check_matmul_nbits(program: Program, node: fx.Node) -> None:
    qweight, scale, zero_point = (tensor_argument(program, node, i) for i in (1, 2, 3))
    bits, block_size = node.args[5], node.args[6]
    assert isinstance(bits, int)
    assert isinstance(block_size, int)
    n, blocks, width = qweight.shape
    if bits not in (2, 4, 8) or block_size < 16 or block_size & (block_size - 1):
        raise _broken(node, f"MatMulNBits takes no {bits} bits in blocks of {block_size}")
    if width != block_size * bits // 8 or tuple(scale.shape) != (n, blocks):
        raise _broken(node, "codes and scale disagree in shape")
    if not is_finite(scale):
        raise _broken(node, "scale holds NaN or infinite values")
    if zero_point.dtype != torch.uint8 or tuple(zero_point.shape) != (n, -(-blocks * bits // 8)):
        raise _broken(node, f"zero_point is {zero_point.dtype} {list(zero_point.shape)}")


_CHECKS: dict[object, Callable[[Program, fx.Node], None]] = {
    GROUP_LINEAR: _check_group_linear,
    POOLED_ADAPTER: _check_adapter,
    MATMUL_NBITS: _check_matmul_nbits,
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
    if bool(adapters) and LEGAL_OPS[program.stage].isdisjoint({POOLED_ADAPTER}):
        raise InternalError(f"adapters are left at stage {program.stage}")
    for name, parameter in program.module.named_parameters():
        if parameter.requires_grad != (name.rpartition(".")[2] in ADAPTER_NAMES):
            raise InternalError(f"{name} is {'' if parameter.requires_grad else 'not '}trainable")
