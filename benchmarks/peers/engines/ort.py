"""ONNX Runtime, driven as `qalora-compile generate` drives it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from qalora_compile.runtime import LanguageModel, open_session


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
        self._cache = self._model.empty_cache()
        self._count = 0

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens; logits `[V]` of the one that follows."""
        self._count += len(tokens)
        mask = np.ones((1, self._count), np.int64)
        ids = np.array([tokens], np.int64)
        logits, self._cache = self._model.step(ids, mask, self._cache)
        last: NDArray[np.float32] = logits[0, -1]
        return last
