"""Zero-points of programs and of exported models, and how a pass or a target moved them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import Site
from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.graphs.read_fx import program_graph
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor
from qalora_compile.verify.proof.match_structure import linear_of
from qalora_compile.verify.proof.weights.linear_map import Linear, NotLinearError
from qalora_compile.verify.proof.weights.unpack import row_codes

_CHUNK = 1 << 22


def zero_points(program: Program) -> dict[str, NDArray[np.float64]]:
    """Zero-points −offset / scale, `[N, L]`, by path of the weight, without groups of scale 0."""
    tensors = program.tensors()
    found = {}
    for path in dict.fromkeys(site.path for site in program.plan if site.bits is not None):
        names = [f"{path}.{part}" for part in ("scale", "offset")]
        if all(name in tensors for name in names):
            scale, offset = (tensors[n].detach().double().cpu().numpy() for n in names)
            used = scale != 0
            found[path] = np.where(used, -offset / np.where(used, scale, 1.0), 0.0)
    return found


def effective_zero_points(
    program: Program, graphs: Sequence[Graph]
) -> dict[str, NDArray[np.float64]]:
    """The zero-points that the weights of `graphs` have on the codes and scales of a program.

    They are `mean(q − W / scale)` of each group, with W the effective weight as a proof reads it.
    This holds however a target stores zero-points (as real numbers, or as integers with a
    correction or its digits). Layers that the graph lacks, layers that are not a linear map there,
    and experts are left out.
    """
    held, found = program_graph(program), dict[str, NDArray[np.float64]]()
    plan = {site.path: site for site in program.plan if site.bits is not None}
    for graph in graphs:
        for row in graph.sites.values():
            mine = plan.get(row.path)
            if mine is None or row.experts is not None or row.path in found:
                continue
            try:
                linear = linear_of(graph, row)
            except NotLinearError:
                continue
            packed, scale = (held.tensors.get(f"{row.path}.{p}") for p in ("qweight", "scale"))
            if (
                packed is not None
                and scale is not None
                and (linear.n, linear.k) == (mine.n, mine.k)
            ):
                found[row.path] = _amount_to(linear, packed, scale, mine)
    return found


def _amount_to(
    linear: Linear, packed: StoredTensor, scale: StoredTensor, site: Site
) -> NDArray[np.float64]:
    """`mean(q − W / scale)` of each group, `[N, L]`, some rows at a time; 0 if the scale is 0."""
    assert site.bits is not None and site.group_size is not None, "the site is quantized"
    starts = np.arange(0, site.k, site.group_size)
    widths = np.diff(np.append(starts, site.k))
    parts = []
    for start in range(0, site.n, step := max(1, _CHUNK // site.k)):
        part = slice(start, min(start + step, site.n))
        codes = row_codes(packed.read()[part], site.bits, site.k).astype(np.float64)
        s = scale.values()[part].astype(np.float64)
        weight = np.add.reduceat(linear.rows(part, -1).weight, starts, axis=1) / widths
        middle = np.add.reduceat(codes, starts, axis=1) / widths
        parts.append(np.where(s != 0, middle - weight / np.where(s != 0, s, 1.0), 0.0))
    return np.concatenate(parts)
