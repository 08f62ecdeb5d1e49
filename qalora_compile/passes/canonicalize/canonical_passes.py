"""The passes that give a captured program its canonical form, in their order."""

from __future__ import annotations

from qalora_compile.passes.canonicalize.canonicalize_clamps import CanonicalizeClamps
from qalora_compile.passes.canonicalize.canonicalize_complex import CanonicalizeComplex
from qalora_compile.passes.canonicalize.canonicalize_pointwise import CanonicalizePointwise
from qalora_compile.passes.framework.base import Pass


def canonical_passes() -> tuple[Pass, ...]:
    """What runs before linear maps are looked for."""
    return CanonicalizeComplex(), CanonicalizeClamps(), CanonicalizePointwise()
