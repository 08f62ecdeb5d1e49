"""The passes that bring a captured program into canonical form, in their order."""

from __future__ import annotations

from qalora_compile.passes.canonicalize.canonicalize_clamps import CanonicalizeClamps
from qalora_compile.passes.canonicalize.canonicalize_complex import CanonicalizeComplex
from qalora_compile.passes.canonicalize.canonicalize_pointwise import CanonicalizePointwise
from qalora_compile.passes.framework.base import Pass


def canonical_passes() -> tuple[Pass, ...]:
    """Run before the search for linear maps."""
    return CanonicalizeComplex(), CanonicalizeClamps(), CanonicalizePointwise()
