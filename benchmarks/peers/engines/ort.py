"""ONNX Runtime, driven as `qalora-compile generate` drives it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from qalora_compile.runtime import LanguageModel, open_session
from qalora_compile.runtime.decoder import Decoder


class Engine:
    """An exported model with a key-value cache."""

    version = f"ONNX Runtime {onnxruntime.__version__}"

    def __init__(
        self, path: str, *, threads: int, context: int, library: bool = False, **_: Any
    ) -> None:
        # Trusted: this benchmark wrote the file, and checking it is no part of other loads.
        session = open_session(Path(path), threads=threads, library=library, trusted=True)
        self._model = LanguageModel(session, context_length=context)
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        self._decoder = Decoder(self._model)

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens; logits `[V]` of the one that follows."""
        last: NDArray[np.float32] = self._decoder.read(np.array([tokens], np.int64))[0, -1]
        return last
