"""legalize-coreml: constants of Core ML that are dequantized in blocks, with real offsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qalora_compile.ir.stages import LEGALIZED
from qalora_compile.passes.legalize.real_groups import LegalizeRealGroups


@dataclass(frozen=True, kw_only=True)
class LegalizeCoreml(LegalizeRealGroups):
    """Rewrite every group_linear for Core ML, which takes real-valued zero-points.

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 4, 32)
    After:   %1 = qalora.group_quant_linear(%x, @fc.qweight, @fc.scale, @fc.zero_point, 4, 32, fp32)
             %2 = aten.add.Tensor(%1, @fc.bias)

    with the tensors of `legalize-ort`. `constexpr_blockwise_shift_scale` takes uint4 and uint8, so
    codes of 2 and 3 bits are stored in 4. The exporter writes each weight as one such constant,
    whose `offset` is the zero-point, and a `linear` that multiplies by it.

    Fires on: every group_linear, and every group_embedding, which becomes a
    `qalora.block_embedding`. Where groups are not a multiple of 16, or K is not a multiple of the
    group size, the stored groups and x are padded (`pad_groups`), as all blocks of such a constant
    have one size.
    Leaves alone: adapters that were not folded.
    Exactness: exact in real arithmetic; zero_point is rounded once to float32.
    """

    name: ClassVar[str] = "legalize-coreml"
    produces: ClassVar[str | None] = f"{LEGALIZED}coreml"
    kernel: ClassVar[str] = "constexpr_blockwise_shift_scale"
    target: ClassVar[str] = "coreml"
    stored: ClassVar[Mapping[int, int]] = {2: 4, 3: 4, 4: 4, 8: 8}
    product: ClassVar[str] = "linear"
