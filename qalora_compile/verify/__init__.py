"""Shows that a step kept a program's meaning. Depends on the IR alone; returns reports."""

from __future__ import annotations

from qalora_compile.verify.compare import Comparison, Report, Tolerance
from qalora_compile.verify.equivalence import verify_equivalence
from qalora_compile.verify.inputs import sample_inputs

__all__ = ["Comparison", "Report", "Tolerance", "sample_inputs", "verify_equivalence"]
