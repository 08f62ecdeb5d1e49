"""Run exported models in ONNX Runtime; needs neither torch nor the rest of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qalora_compile.optional import lazy_attribute

if TYPE_CHECKING:
    from qalora_compile.runtime.encoder_decoder import EncoderDecoder
    from qalora_compile.runtime.language_model import LanguageModel, Sampling
    from qalora_compile.runtime.library import kernel_level, library_path, register
    from qalora_compile.runtime.session import open_session

_HOMES = {
    "EncoderDecoder": "encoder_decoder",
    "LanguageModel": "language_model",
    "Sampling": "language_model",
    "kernel_level": "library",
    "library_path": "library",
    "open_session": "session",
    "register": "library",
}

__all__ = [
    "EncoderDecoder",
    "LanguageModel",
    "Sampling",
    "kernel_level",
    "library_path",
    "open_session",
    "register",
]


if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        return lazy_attribute(__name__, name, _HOMES)
