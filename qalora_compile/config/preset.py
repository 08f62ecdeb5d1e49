"""Presets of an export: what `--preset` stands for."""

from __future__ import annotations

from dataclasses import dataclass

from qalora_compile.config.base import AUTO, one_of

FLOAT = "float"
"""The choice of embeddings that stay in float."""
EMBEDDINGS = (AUTO, FLOAT, 8, 4)
"""How embeddings and heads may be written; `auto` takes 8 bits if that loses next to nothing."""
NBITS = "nbits"
EXPANSIONS = (NBITS, FLOAT)
"""What a file of target `ort` runs on without the operator library."""
DEFAULT_ACCURACY_LEVEL = 0
"""The accuracy level of an export without a preset.

It may be 2 only if the outputs of the test models stay within 1e-4 of their scale and their greedy
tokens are torch's on all test prompts."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Options that belong together.

    Attributes:
        accuracy_level, parameter_dtype, expansion: As in `ExportSpec`.
        embeddings: One of `EMBEDDINGS`.
        purpose: Where it is right, for the summary; "" leaves it out.
    """

    accuracy_level: int
    parameter_dtype: str
    embeddings: int | str
    expansion: str = NBITS
    purpose: str = ""


DEFAULT_PRESET = Preset(
    accuracy_level=DEFAULT_ACCURACY_LEVEL, parameter_dtype=AUTO, embeddings=AUTO
)
"""What an export does without a preset: nothing that changes an output noticeably."""
PRESETS = {
    "exact": Preset(accuracy_level=0, parameter_dtype="float32", embeddings=FLOAT),
    "fast": Preset(accuracy_level=4, parameter_dtype="float16", embeddings=8),
    "small": Preset(accuracy_level=0, parameter_dtype="float16", embeddings=4),
    "web": Preset(
        accuracy_level=0,
        parameter_dtype=AUTO,
        embeddings=8,
        expansion=FLOAT,
        purpose="WASM in a browser (docs/reference/clients.md); for WebGPU: --expansion nbits",
    ),
}


def preset_of(name: str | None) -> Preset:
    """The preset of a name, or the default for None.

    Raises:
        UserInputError: there is no such preset.
    """
    if name is None:
        return DEFAULT_PRESET
    one_of("preset", name, tuple(PRESETS))
    return PRESETS[name]
