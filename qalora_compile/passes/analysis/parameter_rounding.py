"""How far storing scales and zero-points in another dtype moves the weights of a program."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.ir.lazy_tensor import is_stored, materialize_parts
from qalora_compile.ir.program import Program

PARAMETER_LIMIT = 2.0**-12
"""The largest movement of a weight, as a part of its group's step, that counts as none.

float16 keeps scales of GGUF, GPTQ and AWQ checkpoints and integer zero-points exactly; a folded
zero-point moves by up to 2^-8 of a step. With that, SmolLM2-135M wrote other greedy tokens than in
float32 for 4 of 20 prompts."""


@dataclass(frozen=True)
class ParameterRounding:
    """The largest movement of a weight.

    Attributes:
        steps: As a part of the step (scale) of its group; infinite if a value does not fit.
        where: Path of the weight.
    """

    steps: float
    where: str

    @property
    def negligible(self) -> bool:
        """Whether it is within `PARAMETER_LIMIT`."""
        return self.steps <= PARAMETER_LIMIT


def parameter_rounding(program: Program, dtype: torch.dtype) -> ParameterRounding | None:
    """The largest movement if scales and zero-points are stored as `dtype`.

    Args:
        program: Quantized, adapted or folded.
        dtype: float16 or float32.

    Returns:
        None if there is nothing to measure, or scales of layers are only computed while the file is
        written; those of embeddings are computed once more.
    """
    tensors, worst = program.tensors(), None
    for site in program.plan.weights_to_quantize():
        parts = [tensors.get(f"{site.path}.{name}") for name in ("scale", "offset")]
        scale, offset = parts
        if scale is None or offset is None or site.bits is None:
            return None
        if not (site.frozen_integer_zero or (is_stored(scale) and is_stored(offset))):
            return None
        moved = _movement(_values(scale), _values(offset), site.bits, dtype)
        if worst is None or moved > worst.steps:
            worst = ParameterRounding(moved, site.path)
    return worst


def _values(tensor: Tensor) -> Tensor:
    """The values of a tensor; of a deferred one in parts, as its weight may be large."""
    return torch.cat(list(materialize_parts(tensor)))


def _movement(scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype) -> float:
    """The largest |s'(q − z') − s(q − z)| / s over all codes q, of stored values s' and z'.

    It is linear in q, so that it is largest at the least or the greatest code. A group of scale 0
    is stored as the zero-point −offset of scale 1, and measured relative to this.
    """
    s, o = scale.double(), -offset.double()
    flat = (s == 0) | ~torch.isfinite((o / s).float())
    s, z = torch.where(flat, 1.0, s), torch.where(flat, o, o / torch.where(flat, 1.0, s))
    kept_s, kept_z = s.to(dtype).double(), z.to(dtype).double()
    moved = torch.zeros_like(s)
    for code in (0, 2**bits - 1):
        q = torch.where(flat, 0.0, float(code))
        found = (kept_s * (q - kept_z) - s * (q - z)).abs() / s.abs()
        moved = torch.maximum(moved, torch.where(torch.isnan(found), torch.inf, found))
    relative = torch.where(flat & (z != 0), moved / z.abs(), moved)
    return float(relative.max())
