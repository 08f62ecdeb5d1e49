"""Graph-to-graph passes: pure functions of a `Program` with a stated contract, one per file."""

from __future__ import annotations

from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.framework.registry import available_passes, get_pass

__all__ = ["Change", "Pass", "PassResult", "Pipeline", "available_passes", "get_pass"]
