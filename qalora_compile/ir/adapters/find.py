"""The adapters in a program's graph: one class for each kind, one interface for all.

===================  ======================  ==========================================  ==========
class                operator                what it computes                            changes
===================  ======================  ==========================================  ==========
`AddedAdapter`       `pooled_adapter`        an update that is added to a group_linear   offset
`ExpertsAdapter`     `expert_adapter`        the same for each of stacked experts        offset
`IntegerZero`        `integer_zero_linear`   a layer with integer zero-points            offset
`TrainedScale`       `integer_zero_linear`   a layer whose scales are trained            both
`AffineAdapter`      `affine_linear`         a layer with trained scales and offsets     both
`TrainedCodes`       `affine_linear`         the same, and codes are trained             and codes
===================  ======================  ==========================================  ==========

The last column says which parameters of the layer the adapter is folded into.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from qalora_compile.config.adapter import AFFINE, QAT
from qalora_compile.errors import InternalError
from qalora_compile.ir.adapters.added import AddedAdapter, ExpertsAdapter
from qalora_compile.ir.adapters.affine import AffineAdapter, TrainedCodes
from qalora_compile.ir.adapters.base import Adapter
from qalora_compile.ir.adapters.integer_zero import IntegerZero, TrainedScale
from qalora_compile.ir.ops.affine_linear import AffineLinear
from qalora_compile.ir.ops.experts import ExpertAdapter, ExpertLinear
from qalora_compile.ir.ops.integer_zero_linear import (
    INTEGER,
    SCALE,
    IntegerZeroLinear,
)
from qalora_compile.ir.ops.linear import PooledAdapter
from qalora_compile.ir.ops.views import argument

_KINDS: Mapping[object, type[Adapter]] = {
    PooledAdapter.target: AddedAdapter,
    ExpertAdapter.target: ExpertsAdapter,
    INTEGER: IntegerZero,
    SCALE: TrainedScale,
    AFFINE: AffineAdapter,
    QAT: TrainedCodes,
}
"""By the operator, or by the kind where one operator is of several."""


def adapter_at(node: fx.Node) -> Adapter | None:
    """The adapter whose tensors a node reads, or None where it is no adapter's."""
    key: object = node.target
    if node.target is IntegerZeroLinear.target:
        key = argument(node, "kind")
        if key not in _KINDS:
            raise InternalError(f"there is no adapter of kind {key}", where=f"node {node.name}")
    elif node.target is AffineLinear.target:
        key = AFFINE if argument(node, "shift") is None else QAT
    kind = _KINDS.get(key)
    return None if kind is None else kind(node)


def find_adapters(graph: fx.Graph) -> list[Adapter]:
    """Every use of an adapter, in graph order."""
    return [found for node in graph.nodes if (found := adapter_at(node)) is not None]


def adapter_kind(layer: fx.Node, kind: str | None) -> type[Adapter]:
    """The class of a new adapter of a quantized layer.

    Args:
        layer: The node.
        kind: `"integer"`, `"scale"`, `"affine"` or `"qat"`; None for a pooled one.
    """
    if kind is not None:
        return _KINDS[kind]
    return ExpertsAdapter if layer.target is ExpertLinear.target else AddedAdapter
