"""Run exported models in ONNX Runtime; needs neither torch nor the rest of this package."""

from __future__ import annotations

from qalora_compile.runtime.encoder_decoder import EncoderDecoder
from qalora_compile.runtime.language_model import LanguageModel, Sampling
from qalora_compile.runtime.library import kernel_level, library_path, register
from qalora_compile.runtime.session import open_session

__all__ = [
    "EncoderDecoder",
    "LanguageModel",
    "Sampling",
    "kernel_level",
    "library_path",
    "open_session",
    "register",
]
