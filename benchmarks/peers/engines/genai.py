"""ONNX Runtime GenAI on an edge folder."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Engine:
    """A folder with `genai_config.json`; threads are overlaid, the file stays as it was written."""

    def __init__(self, path: str, *, threads: int, context: int, **_: Any) -> None:
        self._library: Any = importlib.import_module("onnxruntime_genai")
        self.version = f"ONNX Runtime GenAI {self._library.__version__}"
        config = self._library.Config(path)
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = self._library.Model(config)
        self._context = context
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._context, do_sample=False)
        self._generator = self._library.Generator(self._model, parameters)

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens; logits `[V]` of the one that follows."""
        self._generator.append_tokens(np.array([tokens], np.int32))
        logits: NDArray[np.float32] = self._generator.get_logits()
        last: NDArray[np.float32] = logits.reshape(-1, logits.shape[-1])[-1]
        return last
