"""Passes by name. Looking one up imports its file only; listing them imports nothing."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.passes.base import Pass

_PASSES = {
    "canonicalize-complex": "CanonicalizeComplex",
    "canonicalize-clamps": "CanonicalizeClamps",
    "canonicalize-pointwise": "CanonicalizePointwise",
    "annotate-linears": "AnnotateLinears",
    "sort-columns": "SortColumns",
    "assign-bits": "AssignBits",
    "quantize-groups": "QuantizeGroups",
    "quantize-embeddings": "QuantizeEmbeddings",
    "insert-adapters": "InsertAdapters",
    "train-parameters": "TrainParameters",
    "fold-adapters": "FoldAdapters",
    "dequantize-groups": "DequantizeGroups",
    "share-group-sums": "ShareGroupSums",
    "pool-tokens": "PoolTokens",
    "widen-halves": "WidenHalves",
    "fuse-rms-norm": "FuseRmsNorm",
    "fuse-rotary": "FuseRotary",
    "fuse-attention": "FuseAttention",
    "fuse-skip-norm": "FuseSkipNorm",
    "fuse-multi-head": "FuseMultiHead",
    "split-planes": "SplitPlanes",
    "legalize-ort": "LegalizeOrt",
    "legalize-ort-stock": "LegalizeOrtStock",
    "legalize-onnx": "LegalizeOnnx",
}


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
    module = importlib.import_module(f"qalora_compile.passes.{name.replace('-', '_')}")
    kind: type[Pass] = getattr(module, _PASSES[name])
    known = kind.option_names()
    for option in options or {}:
        if option not in known:
            listed = ", ".join(o.replace("_", "-") for o in known) or "none"
            raise UserInputError(
                f"the pass {name} has no option {option.replace('_', '-')!r}",
                hint=f"options: {listed}",
            )
    return kind(**(options or {}))
