"""Frozen, keyword-only specifications that convert to JSON and back and refuse unknown keys."""

from __future__ import annotations

from qalora_compile.config.adapter import ADAPTER_KINDS, INITS, POOLINGS, AdapterSpec, Pooling
from qalora_compile.config.base import AUTO, LARGEST_SEED, Spec, check_int, one_of
from qalora_compile.config.export import (
    ACCURACY_LEVELS,
    CHECKPOINT_TARGETS,
    CORRECTIONS,
    FLOAT_TYPES,
    FORMATS,
    FUSION_OPSETS,
    FUSIONS,
    GRAPH_TARGETS,
    ONNX_TARGETS,
    PARAMETER_DTYPES,
    STOCK_ACCURACY_LEVELS,
    TARGETS,
    ExportSpec,
)
from qalora_compile.config.preset import (
    EMBEDDINGS,
    EXPANSIONS,
    FLOAT,
    NBITS,
    PRESETS,
    Preset,
    preset_of,
)
from qalora_compile.config.quant import (
    AUTO_GROUPS,
    BUDGET_UNITS,
    METHODS,
    SUPPORTED_BITS,
    ZERO_POINTS,
    QuantSpec,
)

__all__ = [
    "ACCURACY_LEVELS",
    "ADAPTER_KINDS",
    "AUTO",
    "AUTO_GROUPS",
    "BUDGET_UNITS",
    "CHECKPOINT_TARGETS",
    "CORRECTIONS",
    "EMBEDDINGS",
    "EXPANSIONS",
    "FLOAT",
    "FLOAT_TYPES",
    "FORMATS",
    "FUSIONS",
    "FUSION_OPSETS",
    "GRAPH_TARGETS",
    "INITS",
    "LARGEST_SEED",
    "METHODS",
    "NBITS",
    "ONNX_TARGETS",
    "PARAMETER_DTYPES",
    "POOLINGS",
    "PRESETS",
    "STOCK_ACCURACY_LEVELS",
    "SUPPORTED_BITS",
    "TARGETS",
    "ZERO_POINTS",
    "AdapterSpec",
    "ExportSpec",
    "Pooling",
    "Preset",
    "QuantSpec",
    "Spec",
    "check_int",
    "one_of",
    "preset_of",
]
