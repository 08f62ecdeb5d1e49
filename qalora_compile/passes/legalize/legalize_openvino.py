"""legalize-openvino: the compressed matrix products of OpenVINO, with real-valued zero-points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from qalora_compile.config import PARAMETER_DTYPES, one_of
from qalora_compile.ir.packing.kernel_layouts import GROUP_UNIT
from qalora_compile.ir.stages import LEGALIZED
from qalora_compile.passes.legalize.base import Layer
from qalora_compile.passes.legalize.real_groups import LegalizeRealGroups

_STEP = 32


@dataclass(frozen=True, kw_only=True)
class LegalizeOpenvino(LegalizeRealGroups):
    """Rewrite every group_linear for OpenVINO, which takes real-valued zero-points.

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 3, 32)
    After:   %1 = qalora.group_quant_linear(%x, @fc.qweight, @fc.scale, @fc.zero_point, 4, 32, fp32)
             %2 = aten.add.Tensor(%1, @fc.bias)

    with the tensors of `legalize-ort`. OpenVINO has no 3-bit type, so 3-bit codes are stored in 4
    bits. The exporter writes each weight as Constant(u4) → Convert → Subtract(zero_point) →
    Multiply(scale) → Reshape, which OpenVINO's CPU plugin makes part of the product.

    Fires on: every group_linear, every expert_linear, which becomes one
    `qalora.expert_group_quant_linear`, and every group_embedding, which becomes a
    `qalora.block_embedding`. Where groups are not a multiple of 16, or K is not a multiple of the
    group size, the stored groups and x are padded (`pad_groups`). Groups above 32 that are no
    multiple of 32 are stored as several of 16, as OpenVINO's kernels compute them wrongly.
    Leaves alone: adapters that were not folded.
    Exactness: exact in real arithmetic; zero_point is rounded once to float32. With
    `parameter_dtype="float16"`, scale and zero_point are rounded to float16.

    Options:
        parameter_dtype: As `ExportSpec.parameter_dtype`.
    """

    name: ClassVar[str] = "legalize-openvino"
    produces: ClassVar[str | None] = f"{LEGALIZED}openvino"
    kernel: ClassVar[str] = "the matrix product of OpenVINO"
    target: ClassVar[str] = "openvino"
    stored: ClassVar[Mapping[int, int]] = {2: 2, 3: 4, 4: 4, 8: 8}
    product: ClassVar[str] = "MatMul"
    holds_experts: ClassVar[bool] = True

    parameter_dtype: str = "float32"

    def __post_init__(self) -> None:
        one_of("parameter_dtype", self.parameter_dtype, PARAMETER_DTYPES)

    @property
    def dtype(self) -> torch.dtype:
        """Of scale and zero-point."""
        found: torch.dtype = getattr(torch, self.parameter_dtype)
        return found

    def stored_width(self, layer: Layer) -> int:
        """Codes of a stored group, which is a padded group or an equal part of it.

        OpenVINO 2026.4 computes wrong products for groups above 32 that are no multiple of 32 (48,
        80, 112, 144), without an error: such a group is stored as groups of 16 with the same
        parameters.
        """
        width = super().stored_width(layer)
        return width if width % _STEP == 0 or width < _STEP else GROUP_UNIT
