"""The operators of the IR, one file per family: schema, fake kernel and reference kernel.

Importing the package registers them all.
"""

from qalora_compile.ir.ops import (
    adapted_linear,
    affine_linear,
    autocast,
    embedding,
    experts,
    int4_kernels,
    integer_zero_linear,
    linear,
    target_kernels,
    transformer_fusions,
)

__all__ = [
    "adapted_linear",
    "affine_linear",
    "autocast",
    "embedding",
    "experts",
    "int4_kernels",
    "integer_zero_linear",
    "linear",
    "target_kernels",
    "transformer_fusions",
]
