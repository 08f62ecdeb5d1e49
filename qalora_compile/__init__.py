"""qalora-compile: fine-tune a model on its own INT4/3/2 weights and ship one INT4 ONNX file.

    import qalora_compile as qc

    program = qc.capture_model(model, (x,))
    program = qc.quantize_groups(program, qc.QuantSpec(bits=4, group_size=32))
    program = qc.insert_adapters(program, qc.AdapterSpec(rank=16))
    ...                                          # train program.adapter_parameters()
    folded = qc.fold_adapters(program)
    qc.export_model(folded, "edge/model.onnx")

Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qalora_compile._version import __version__
from qalora_compile.optional import lazy_attribute

if TYPE_CHECKING:
    from qalora_compile.api import (
        adapt_module_,
        add_kv_cache,
        export_model,
        fold_adapters,
        insert_adapters,
        quantize_groups,
        split_encoder_decoder,
    )
    from qalora_compile.capture.model import capture_model
    from qalora_compile.config import AdapterSpec, ExportSpec, QuantSpec
    from qalora_compile.errors import QaloraError
    from qalora_compile.ir.program import Program
    from qalora_compile.passes.framework.base import Pass, PassResult
    from qalora_compile.passes.framework.pipeline import Pipeline
    from qalora_compile.verify.compare import Tolerance
    from qalora_compile.verify.equivalence import verify_equivalence
    from qalora_compile.verify.proof.prove import prove_equivalence

_HOMES = {
    "AdapterSpec": "config",
    "ExportSpec": "config",
    "Pass": "passes.framework.base",
    "PassResult": "passes.framework.base",
    "Pipeline": "passes.framework.pipeline",
    "Program": "ir.program",
    "QaloraError": "errors",
    "QuantSpec": "config",
    "Tolerance": "verify.compare",
    "adapt_module_": "api.steps",
    "add_kv_cache": "api.forms",
    "capture_model": "capture.model",
    "export_model": "api.export",
    "fold_adapters": "api.steps",
    "insert_adapters": "api.steps",
    "prove_equivalence": "verify.proof.prove",
    "quantize_groups": "api.steps",
    "split_encoder_decoder": "api.forms",
    "verify_equivalence": "verify.equivalence",
}

__all__ = [
    "AdapterSpec",
    "ExportSpec",
    "Pass",
    "PassResult",
    "Pipeline",
    "Program",
    "QaloraError",
    "QuantSpec",
    "Tolerance",
    "__version__",
    "adapt_module_",
    "add_kv_cache",
    "capture_model",
    "export_model",
    "fold_adapters",
    "insert_adapters",
    "prove_equivalence",
    "quantize_groups",
    "split_encoder_decoder",
    "verify_equivalence",
]


if not TYPE_CHECKING:  # otherwise a misspelt name would pass the type checker

    def __getattr__(name: str) -> Any:
        return lazy_attribute(__name__, name, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
