"""Checks that a transformation preserves a program's meaning. Depends on the IR alone.

Names are imported on first use, so that certificates can be checked without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qalora_compile.optional import lazy_attribute

if TYPE_CHECKING:
    from qalora_compile.verify.compare import Comparison, Report, Tolerance
    from qalora_compile.verify.equivalence import verify_equivalence
    from qalora_compile.verify.inputs import sample_inputs
    from qalora_compile.verify.numeric.compare_nodes import compare_nodes, named_inputs
    from qalora_compile.verify.numeric.report import NumericReport
    from qalora_compile.verify.proof.certificate import Certificate
    from qalora_compile.verify.proof.match_structure import compare_structure
    from qalora_compile.verify.proof.prove import check_certificate, prove_equivalence

_HOMES = {
    "Certificate": "proof.certificate",
    "Comparison": "compare",
    "NumericReport": "numeric.report",
    "Report": "compare",
    "Tolerance": "compare",
    "check_certificate": "proof.prove",
    "compare_nodes": "numeric.compare_nodes",
    "compare_structure": "proof.match_structure",
    "named_inputs": "numeric.compare_nodes",
    "prove_equivalence": "proof.prove",
    "sample_inputs": "inputs",
    "verify_equivalence": "equivalence",
}

__all__ = [
    "Certificate",
    "Comparison",
    "NumericReport",
    "Report",
    "Tolerance",
    "check_certificate",
    "compare_nodes",
    "compare_structure",
    "named_inputs",
    "prove_equivalence",
    "sample_inputs",
    "verify_equivalence",
]


if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        return lazy_attribute(__name__, name, _HOMES)
