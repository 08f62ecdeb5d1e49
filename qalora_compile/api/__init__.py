"""The steps from a captured program to an exported model, as plain functions."""

from __future__ import annotations

from qalora_compile.api.export import complete_spec, export_model, lower, lowering
from qalora_compile.api.forms import add_kv_cache, packed_form, split_encoder_decoder
from qalora_compile.api.steps import (
    adapt_module_,
    fold_adapters,
    insert_adapters,
    quantize_groups,
)

__all__ = [
    "adapt_module_",
    "add_kv_cache",
    "complete_spec",
    "export_model",
    "fold_adapters",
    "insert_adapters",
    "lower",
    "lowering",
    "packed_form",
    "quantize_groups",
    "split_encoder_decoder",
]
