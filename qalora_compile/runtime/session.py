"""ONNX Runtime sessions, and token generation with an exported language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.optional import require
from qalora_compile.runtime.library import kernel_level, register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


QDQ_ACCURACY_KEY = "session.qdq_matmulnbits_accuracy_level"


def open_session(
    path: str | Path,
    *,
    threads: int | None = None,
    library: bool | None = None,
    exact: bool = False,
) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Args:
        path: A `.onnx` file.
        threads: Threads inside an operator; None leaves the choice to ONNX Runtime.
        library: Run `GroupQuantLinear` with this package's operator library; None takes it where it
            was built. Models without that operator are the same either way.
        exact: Compute models of target `onnx` in float32, not on int8 activations.

    Raises:
        UserInputError: the file is missing, truncated or not one that ONNX Runtime loads.
        UnsupportedError: the library is asked for, and was not built.
    """
    runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
    if not Path(path).is_file():
        raise UserInputError(f"there is no file {path}", where=str(path))
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry(QDQ_ACCURACY_KEY, "0")
    if library or (library is None and kernel_level() is not None):
        register(options)
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises bare exception types of its own
        raise UserInputError(
            f"ONNX Runtime cannot load {Path(path).name}: {str(error).splitlines()[0]}",
            where=str(path),
            hint="export it again; a truncated file cannot be repaired",
        ) from error


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token (greedy).
        top_p: Sample from the smallest set of tokens with this much probability together.
        seed: Of the sampling.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise UserInputError(
                f"temperature is {self.temperature} and top_p is {self.top_p}",
                hint="use temperature 0 or more and top_p in (0, 1]",
            )


class LanguageModel:
    """A causal language model exported as one full-sequence forward.

    Args:
        session: From `open_session`; takes `input_ids` and, optionally, `attention_mask`.

    Raises:
        UnsupportedError: the model takes other inputs, or gives no `[B, T, V]` output.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self._inputs = [i.name for i in session.get_inputs()]
        self._output = session.get_outputs()[0]
        unknown = [n for n in self._inputs if n not in ("input_ids", "attention_mask")]
        if unknown or len(self._output.shape) != 3:
            raise UnsupportedError(
                f"the model takes {', '.join(self._inputs)} and gives {self._output.name}: it is "
                "no causal language model exported by this package",
            )

    def logits(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits `[B, T, V]` float32 of token ids `[B, T]` int64; no mask means all ones."""
        mask = attention_mask if attention_mask is not None else input_ids * 0 + 1
        feed = {"input_ids": input_ids, "attention_mask": mask}
        result = self.session.run([self._output.name], {n: feed[n] for n in self._inputs})
        found: NDArray[np.float32] = result[0]
        return found

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop: Sequence[int] = (),
        sampling: Sampling | None = None,
    ) -> Iterator[int]:
        """Yield new tokens one by one, until a stop token (not yielded) or the limit.

        Each token runs the whole sequence again: the model has no key-value cache.
        """
        import numpy as np

        sampling = sampling or Sampling()
        if not prompt:
            raise UserInputError("the prompt has no token")
        generator = np.random.default_rng(sampling.seed)
        tokens = list(prompt)
        for _ in range(max_new_tokens):
            last = self.logits(np.array([tokens], dtype=np.int64))[0, -1]
            token = choose_token(last, sampling, generator)
            if token in stop:
                return
            tokens.append(token)
            yield token


def choose_token(
    logits: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator
) -> int:
    """The next token from logits `[V]`: greedy, or nucleus sampling (arXiv 1904.09751)."""
    import numpy as np

    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = order[before < sampling.top_p]
    weights = probabilities[kept] / probabilities[kept].sum()
    return int(generator.choice(kept, p=weights))
