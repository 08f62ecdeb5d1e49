"""Sentence vectors from an exported encoder, and `/v1/embeddings`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qalora_compile.errors import UnsupportedError
from qalora_compile.optional import require
from qalora_compile.runtime.session import run_values
from qalora_compile.serving.api_errors import ApiError, refused
from qalora_compile.serving.fields import Fields, inputs
from qalora_compile.serving.limits import Limits

if TYPE_CHECKING:
    from numpy.typing import NDArray

_VECTOR, _STATES = "sentence_embedding", "last_hidden_state"
_TOKENS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"
_KNOWN = frozenset({"model", "input", "encoding_format", "dimensions"})
_ROWS = 16
"""Texts that are read at once."""


class Embedder:
    """A sentence encoder.

    Args:
        session: From `open_session`.
        tokenizer: Its tokenizer.
        pooling: `mean` or `cls`, for a graph that does not pool.
        normalize: Whether vectors are divided by their norm, likewise.
        longest: Largest number of tokens of a text.
        where: The folder, for errors.

    Raises:
        UnsupportedError: the graph takes or gives something else.
    """

    def __init__(
        self,
        session: Any,
        tokenizer: Any,
        *,
        pooling: str | None,
        normalize: bool,
        longest: int,
        where: str,
    ) -> None:
        self._session, self.tokenizer = session, tokenizer
        self._pooling, self._normalize = pooling, normalize
        self.longest = longest
        self._inputs = {each.name for each in session.get_inputs()}
        outputs = {each.name for each in session.get_outputs()}
        self._output = _VECTOR if _VECTOR in outputs else _STATES
        known = {_TOKENS, _MASK, _TYPES}
        pools = self._output == _VECTOR or (pooling in ("mean", "cls") and _STATES in outputs)
        if not (_TOKENS in self._inputs <= known and pools):
            raise UnsupportedError(
                f"the model takes {', '.join(sorted(self._inputs))} and gives "
                f"{', '.join(sorted(outputs))}: it is neither a language model nor a sentence "
                "encoder",
                where=where,
                hint="export a sentence encoder with --pooling mean or cls",
            )

    def embed(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The vectors `[n, D]` of texts, given as tokens."""
        parts = [self._embed(rows[start : start + _ROWS]) for start in range(0, len(rows), _ROWS)]
        return np.concatenate(parts)

    def _embed(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
        width = max(map(len, rows))
        ids, mask = np.zeros((2, len(rows), width), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        feed = {_TOKENS: ids, _MASK: mask, _TYPES: np.zeros_like(ids)}
        values = {
            name: runtime.OrtValue.ortvalue_from_numpy(value)
            for name, value in feed.items()
            if name in self._inputs
        }
        found: NDArray[np.float32] = run_values(self._session, [self._output], values)[0].numpy()
        if self._output == _VECTOR:
            return found
        weights = mask[..., None].astype(np.float32)
        mean = (found * weights).sum(1) / weights.sum(1)
        vectors: NDArray[np.float32] = found[:, 0] if self._pooling == "cls" else mean
        if self._normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request of `/v1/embeddings` that was checked.

    Attributes:
        rows: The tokens of each text.
        encoded: Whether vectors are sent as base64 of float32.
        dimensions: The size of a vector that the client expects; None: any.
    """

    rows: tuple[list[int], ...]
    encoded: bool
    dimensions: int | None


def embedding_request(
    body: Mapping[str, Any], model: Embedder, vocabulary: int, limits: Limits
) -> EmbeddingRequest:
    """Check a request.

    Raises:
        ApiError: it is malformed, or a text is too long.
    """
    fields = Fields(body, _KNOWN, {"user": ()})
    form = fields.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise refused("encoding_format must be float or base64", "encoding_format")
    given = inputs(fields.get("input"), "input", vocabulary, limits.max_inputs)
    rows = tuple(each if isinstance(each, list) else _encode(model, each) for each in given)
    longest = max(map(len, rows))
    if longest > model.longest:
        raise ApiError(
            400,
            f"a text has {longest} tokens, and the model takes {model.longest}",
            code="context_length_exceeded",
            param="input",
        )
    return EmbeddingRequest(rows, form == "base64", fields.integer("dimensions", 1, 1 << 20))


def _encode(model: Embedder, text: str) -> list[int]:
    try:
        return list(model.tokenizer(text).input_ids)
    except Exception as error:  # tokenizers raise many types
        raise refused(f"the tokenizer cannot read the text: {error}", "input") from error


def embedding_answer(
    request: EmbeddingRequest, vectors: NDArray[np.float32], name: str
) -> dict[str, Any]:
    """The answer.

    Raises:
        ApiError: the vectors have another size than was asked for.
    """
    size = vectors.shape[1]
    if request.dimensions not in (None, size):
        raise refused(f"the model's vectors have {size} dimensions", "dimensions")
    count = sum(map(len, request.rows))
    rows = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _base64(vector) if request.encoded else vector.tolist(),
        }
        for index, vector in enumerate(vectors.astype("<f4"))
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": rows, "model": name, "usage": usage}


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.tobytes()).decode("ascii")
