"""Graph-to-graph passes: pure functions of a `Program` with a stated contract, one per file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qalora_compile.optional import lazy_attribute

if TYPE_CHECKING:
    from qalora_compile.passes.framework.base import Change, Pass, PassResult
    from qalora_compile.passes.framework.pipeline import Pipeline
    from qalora_compile.passes.framework.registry import available_passes, get_pass

_HOMES = {
    "Change": "framework.base",
    "Pass": "framework.base",
    "PassResult": "framework.base",
    "Pipeline": "framework.pipeline",
    "available_passes": "framework.registry",
    "get_pass": "framework.registry",
}

__all__ = ["Change", "Pass", "PassResult", "Pipeline", "available_passes", "get_pass"]


if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        return lazy_attribute(__name__, name, _HOMES)
