"""The steps from a captured program to an exported model, as plain functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qalora_compile.optional import lazy_attribute

if TYPE_CHECKING:
    from qalora_compile.api.export import complete_spec, export_model, lower, lowering
    from qalora_compile.api.forms import add_kv_cache, packed_form, split_encoder_decoder
    from qalora_compile.api.steps import (
        adapt_module_,
        fold_adapters,
        insert_adapters,
        quantize_groups,
    )

_HOMES = {
    "adapt_module_": "steps",
    "add_kv_cache": "forms",
    "complete_spec": "export",
    "export_model": "export",
    "fold_adapters": "steps",
    "insert_adapters": "steps",
    "lower": "export",
    "lowering": "export",
    "packed_form": "forms",
    "quantize_groups": "steps",
    "split_encoder_decoder": "forms",
}

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


if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        return lazy_attribute(__name__, name, _HOMES)
