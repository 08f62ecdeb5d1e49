"""`LEARNED`, the entry of the registry."""

from __future__ import annotations

from torch import Tensor

from qalora_compile.config import QuantSpec
from qalora_compile.quantizers.base import Method, QuantizedWeight
from qalora_compile.quantizers.registry import GPTQ
from qalora_compile.quantizers.statistics import ActivationStatistics
from qalora_compile.training.learned.end_to_end import learn_parameters
from qalora_compile.training.learned.lessons import check_texts

_NOTE = "before scales and offsets of all layers are trained together"


def _start(
    weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics | None
) -> QuantizedWeight:
    """The start: `gptq`."""
    found = GPTQ.quantize(weight, spec, statistics)
    return QuantizedWeight(found.affine, (*found.notes, _NOTE))


LEARNED = Method(
    quantize=_start,
    needs_data=True,
    max_error=GPTQ.max_error,
    finish=learn_parameters,
    check=check_texts,
)
