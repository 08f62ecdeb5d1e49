"""OpenVINO on the stateful model that its own GenAI package makes of a GGUF file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODEL = "openvino_model.xml"
"""What `convert` leaves next to the GGUF file."""


class Engine:
    """A compiled model and its one request, whose state is the key-value cache."""

    def __init__(self, path: str, *, threads: int, **_: Any) -> None:
        library: Any = importlib.import_module("openvino")
        self.version = f"OpenVINO {library.__version__.partition('-')[0]}"
        core = library.Core()
        model = core.read_model(path)
        _keep_last_position(model)
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        self._request.reset_state()
        self._count = 0

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens; logits `[V]` of the one that follows."""
        before, self._count = self._count, self._count + len(tokens)
        self._request.infer(
            {
                "input_ids": np.array([tokens], np.int64),
                "attention_mask": np.ones((1, self._count), np.int64),
                "position_ids": np.arange(before, self._count)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        logits: NDArray[np.float32] = self._request.get_tensor("logits").data[0, -1]
        return logits


def _keep_last_position(model: Any) -> None:
    """Let the head multiply the last position only, as OpenVINO's own pipeline does."""
    operators = importlib.import_module("openvino.opset13")
    head = model.get_results()[0].input_value(0).get_node()
    start, stop, step, axis = (np.array([value], np.int64) for value in (-1, 2**31, 1, 1))
    last = operators.slice(head.input_value(0), start, stop, step, axis)
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def convert(gguf: str) -> None:
    """Write the model next to its GGUF file."""
    library: Any = importlib.import_module("openvino_genai")
    library.LLMPipeline(gguf, "CPU", enable_save_ov_model=True)


if __name__ == "__main__":
    convert(sys.argv[1])
