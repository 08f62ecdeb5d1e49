"""The stages of a program, and the names of the tensors of a quantized weight."""

from __future__ import annotations

from qalora_compile.config import GRAPH_TARGETS

FLOAT = "float"


ANNOTATED = "annotated"


QUANTIZED = "quantized"


ADAPTED = "adapted"


FOLDED = "folded"


LEGALIZED = "legalized:"


STAGES = (FLOAT, ANNOTATED, QUANTIZED, ADAPTED, FOLDED)


ANY_STAGE = (*STAGES, *(f"{LEGALIZED}{target}" for target in GRAPH_TARGETS))


CODE_NAMES = ("qweight", "scale", "offset")


ADAPTER_NAMES = ("lora_A", "lora_B")
"""Names of the tensors of a quantized weight, and of its adapter, below its path."""


GAIN, SHIFT = "adapter_gain", "adapter_shift"


TRAINED_NAMES = (*ADAPTER_NAMES, GAIN, SHIFT)
"""Names of all tensors that the adapters of some kind train, below the path of their weight."""


PLANE_NAMES = ("low", "high")
"""Names of the two 4-bit planes of a weight of 8 bits, below its path."""
HIGH_CODES = f".{PLANE_NAMES[1]}.qweight"
"""How the name of a high plane's codes ends."""
