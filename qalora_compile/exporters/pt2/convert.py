"""`convert`: a legalized program as an `ExportedProgram` of ATen's operators alone."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from qalora_compile.exporters.onnx.exported import retrace
from qalora_compile.exporters.traced import (
    down_to_site,
    pad_groups,
    pooled_adapter,
    with_values,
)
from qalora_compile.ir.affine import sum_groups
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.int4_kernels import int4pack_rows
from qalora_compile.ir.packing.int4_layout import layout_name, pack_int4, probe
from qalora_compile.ir.program import Program
from qalora_compile.ir.shape_propagation import without_assertions
from qalora_compile.ir.spec import (
    GROUP_EMBEDDING,
    GROUP_SUM,
    INT4PACK_LINEAR,
    PAD_GROUPS,
    POOLED_ADAPTER,
)
from qalora_compile.ir.torch_internals import ASSERT_TRUE, PACK_INT4, OpOverload

_ATEN = torch.ops.aten
_PROBE, _PACKED_PROBE = "int4_probe", "int4_probe_packed"
_OWN = frozenset({INT4PACK_LINEAR, GROUP_EMBEDDING, GROUP_SUM, PAD_GROUPS, POOLED_ADAPTER})
_CUSTOM, _SITE_KEY = "custom", "site"
_BYTE = 8
"""Bits of a byte, and the codes of a unit of the bit stream."""


def convert(program: Program) -> tuple[ExportedProgram, dict[str, str]]:
    """Export the graph.

    Args:
        program: Lowered for target `torch`, or a float program.

    Returns:
        The exported program, and site name → name of the node that computes its output.
    """
    program = with_values(program)
    with program.evaluating(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = retrace(program, _guarded(program))
        _carry_sites(program, exported)
        exported = exported.run_decompositions(dict(_DECOMPOSITIONS))
    sites = {}
    for node in exported.graph.nodes:
        site = node.meta.get(_CUSTOM, {}).get(_SITE_KEY)
        if site is not None:
            sites[site] = node.name  # an operator may become several: the last has its output
        node.meta = (
            {"val": node.meta["val"]} if "val" in node.meta else {}
        )  # no paths of this machine
    exported.example_inputs = None  # they would be stored as a pickle
    return exported, sites


def _guarded(program: Program) -> fx.GraphModule:
    """The graph, which first asserts that codes are packed as this processor reads them."""
    graph, tensors = without_assertions(program), program.tensors()
    if any(node.target is INT4PACK_LINEAR for node in graph.nodes):
        tensors |= {_PROBE: probe(), _PACKED_PROBE: pack_int4(probe())}
        with graph.inserting_before(next(iter(graph.nodes))):
            codes, packed = graph.get_attr(_PROBE), graph.get_attr(_PACKED_PROBE)
        first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
        with graph.inserting_before(first):
            call = graph.call_function
            here = call(PACK_INT4, (codes, 1))
            same = call(_ATEN.all.default, (call(_ATEN.eq.Tensor, (here, packed)),))
            text = (
                f"the 4-bit weights of this file are packed for {layout_name()}, and this "
                "processor reads another layout: export the model on a machine like this one"
            )
            call(ASSERT_TRUE, (same, text))
    return program.module.rebuild(graph, tensors)


def _carry_sites(program: Program, exported: ExportedProgram) -> None:
    """Mark the nodes of the new graph that compute sites; calls are in the order of the old one."""
    made = [node for node in exported.graph.nodes if node.target in _OWN]
    old = [node for node in program.graph.nodes if node.target in _OWN]
    for call, again in zip(old, made, strict=True):
        marked, node = down_to_site(call, again)
        site = site_of(marked)
        if site is not None and marked.target == node.target:
            node.meta[_CUSTOM] = {_SITE_KEY: site}


def _group_embedding(
    ids: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    k: int,
) -> Tensor:
    """`qalora.group_embedding`."""
    codes, s, o = (t[ids.flatten()] for t in (qweight, scale, offset))
    values = _unpack(codes, bits)[:, :k].to(scale.dtype)
    s, o = (t.repeat_interleave(group_size, dim=1)[:, :k] for t in (s, o))
    rows: Tensor = values * s + o
    return rows.reshape(*ids.shape, k).to(dtype)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """`packing.bitstream.unpack_codes` without writing into a tensor, padding codes included."""
    if bits == _BYTE:
        return packed
    words = packed.unflatten(1, (-1, bits)).long()
    places = torch.arange(bits, device=packed.device) * _BYTE
    word = (words << places).sum(-1, keepdim=True)
    shifts = torch.arange(_BYTE, device=packed.device) * bits
    codes: Tensor = (word >> shifts) & (2**bits - 1)
    return codes.flatten(1)


_DECOMPOSITIONS: dict[OpOverload, Any] = {
    INT4PACK_LINEAR: int4pack_rows,
    GROUP_EMBEDDING: _group_embedding,
    GROUP_SUM: sum_groups,
    PAD_GROUPS: pad_groups,
    POOLED_ADAPTER: pooled_adapter,
}
"""Operators of this package that ATen has the parts of; torch keeps all others as they are."""
