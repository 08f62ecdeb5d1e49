"""Passes by name. Looking one up imports its file only; listing them imports nothing."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.passes.framework.base import Pass

_PASSES = {
    "canonicalize-complex": "canonicalize_complex:CanonicalizeComplex",
    "canonicalize-clamps": "canonicalize_clamps:CanonicalizeClamps",
    "canonicalize-pointwise": "canonicalize_pointwise:CanonicalizePointwise",
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
    "split-planes": "legalize.split_planes:SplitPlanes",
    "legalize-ort": "legalize.legalize_ort:LegalizeOrt",
    "legalize-ort-stock": "legalize.legalize_ort_stock:LegalizeOrtStock",
    "legalize-onnx": "legalize.legalize_onnx:LegalizeOnnx",
}
"""Name → module in `qalora_compile.passes` and class."""


def available_passes() -> tuple[str, ...]:
    """The names that `Pipeline.parse` knows."""
    return tuple(_PASSES)


def get_pass(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """A pass by name with the given options.

    Raises:
        UserInputError: the name or an option is unknown, or a value is out of range.
    """
    if name not in _PASSES:
        near = difflib.get_close_matches(name, _PASSES, n=1)
        raise UserInputError(
            f"there is no pass {name!r}",
            hint=(f"did you mean {near[0]}? " if near else "") + f"passes: {', '.join(_PASSES)}",
        )
    home, _, class_name = _PASSES[name].partition(":")
    module = importlib.import_module(f"qalora_compile.passes.{home}")
    kind: type[Pass] = getattr(module, class_name)
    known = kind.option_names()
    for option in options or {}:
        if option not in known:
            listed = ", ".join(o.replace("_", "-") for o in known) or "none"
            raise UserInputError(
                f"the pass {name} has no option {option.replace('_', '-')!r}",
                hint=f"options: {listed}",
            )
    return kind(**(options or {}))
