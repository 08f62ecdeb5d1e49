"""Passes by name. Looking one up imports its file only; listing them imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from qalora_compile.errors import UserInputError
from qalora_compile.passes.framework.base import Pass
from qalora_compile.registry import Registry

_HOMES = {
    "canonicalize-complex": "canonicalize.canonicalize_complex:CanonicalizeComplex",
    "canonicalize-clamps": "canonicalize.canonicalize_clamps:CanonicalizeClamps",
    "canonicalize-pointwise": "canonicalize.canonicalize_pointwise:CanonicalizePointwise",
    "annotate-linears": "annotate_linears:AnnotateLinears",
    "sort-columns": "sort_columns:SortColumns",
    "assign-bits": "assign_bits:AssignBits",
    "quantize-groups": "quantize_groups:QuantizeGroups",
    "quantize-embeddings": "quantize_embeddings:QuantizeEmbeddings",
    "insert-adapters": "insert_adapters:InsertAdapters",
    "train-parameters": "train_parameters:TrainParameters",
    "fold-adapters": "fold_adapters:FoldAdapters",
    "dequantize-groups": "dequantize_groups:DequantizeGroups",
    "share-group-sums": "share_group_sums:ShareGroupSums",
    "pool-tokens": "pool_tokens:PoolTokens",
    "widen-halves": "legalize.widen_halves:WidenHalves",
    "fuse-rms-norm": "fusions.fuse_rms_norm:FuseRmsNorm",
    "fuse-rotary": "fusions.fuse_rotary:FuseRotary",
    "fuse-attention": "fusions.fuse_attention:FuseAttention",
    "fuse-skip-norm": "fusions.fuse_skip_norm:FuseSkipNorm",
    "fuse-multi-head": "fusions.fuse_multi_head:FuseMultiHead",
    "fuse-shared-input": "fusions.fuse_shared_input:FuseSharedInput",
    "split-planes": "legalize.split_planes:SplitPlanes",
    "legalize-ort": "legalize.legalize_ort:LegalizeOrt",
    "legalize-ort-stock": "legalize.legalize_ort_stock:LegalizeOrtStock",
    "legalize-onnx": "legalize.legalize_onnx:LegalizeOnnx",
    "legalize-openvino": "legalize.legalize_openvino:LegalizeOpenvino",
    "legalize-torch": "legalize.legalize_torch:LegalizeTorch",
    "legalize-coreml": "legalize.legalize_coreml:LegalizeCoreml",
}
"""Name → module in `qalora_compile.passes` and class."""
PASSES = Registry(
    "pass",
    "qalora_compile.passes",
    {name: f"qalora_compile.passes.{home}" for name, home in _HOMES.items()},
)

P = TypeVar("P", bound=type[Pass])


def register_pass(kind: P) -> P:
    """Register a class of passes by its `name`, for pipelines in text and for histories.

    Returns:
        The class, so that this can be used as a decorator.

    Raises:
        ExtensionError: the name is taken, or `kind` is not a class of passes.
    """
    name = str(getattr(kind, "name", kind))
    PASSES.add(name, _checked(name, kind))
    return kind


def available_passes() -> tuple[str, ...]:
    """The names that `Pipeline.parse` knows."""
    return PASSES.names()


def get_pass(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """A pass by name with the given options.

    Raises:
        UserInputError: the name or an option is unknown, or a value is out of range.
        ExtensionError: the package that brings it cannot be imported, or brings something else.
    """
    kind = _checked(name, PASSES.load(name))
    known = kind.option_names()
    for option in options or {}:
        if option not in known:
            listed = ", ".join(o.replace("_", "-") for o in known) or "none"
            raise UserInputError(
                f"the pass {name} has no option {option.replace('_', '-')!r}",
                hint=f"options: {listed}",
            )
    return kind(**(options or {}))


def _checked(name: str, kind: object) -> type[Pass]:
    """Check that `kind` is a class of passes of that name.

    Raises:
        ExtensionError: it is not.
    """
    if not isinstance(kind, type) or not issubclass(kind, Pass):
        raise PASSES.unfit(name, "a class derived from Pass")
    if getattr(kind, "name", None) != name:
        raise PASSES.unfit(name, f"a pass whose `name` is {name!r}")
    return kind
