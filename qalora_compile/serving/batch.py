"""Texts of different lengths that a model continues together, one token of each in a step.

Their caches are joined along the batch axis, with padding before the shorter ones. So a step reads
the weights once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qalora_compile.errors import QaloraError
from qalora_compile.optional import require
from qalora_compile.runtime.language_model import Context, LanguageModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PROBE = (3, 1, 4, 1, 5, 9, 2, 6)
_SAME = 1e-3


class Batch:
    """The texts that a model continues together, in rows.

    Args:
        model: A model with a cache and a mask, see `joins_texts`.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.lengths: list[int] = []
        """Tokens in the cache of each row, without padding."""
        self._cache: dict[str, Any] = {}

    def join(self, context: Context) -> None:
        """Add a text as the last row."""
        lengths = [*self.lengths, len(context.tokens)]
        caches = [self._cache, context.cache] if self.lengths else [context.cache]
        self._cache = _joined(caches, max(lengths))
        self.lengths = lengths

    def leave(self, row: int) -> None:
        """Remove a row, and the padding that no other row needs."""
        lengths = self.lengths[:row] + self.lengths[row + 1 :]
        if lengths:
            import numpy as np

            kept = np.delete(np.arange(len(self.lengths)), row)
            self._cache = _map(self._cache, lambda value: value[kept][:, :, -max(lengths) :])
        else:
            self._cache = {}
        self.lengths = lengths

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read the next token of every row; returns the logits `[rows, V]` after them."""
        import numpy as np

        lengths = np.array(self.lengths) + 1
        width = int(lengths.max())
        mask = (np.arange(width) >= width - lengths[:, None]).astype(np.int64)
        ids = np.array(tokens, np.int64)[:, None]
        logits, cache = self._model.step(ids, mask, self._cache)
        self._cache, self.lengths = cache, lengths.tolist()
        last: NDArray[np.float32] = logits[:, -1]
        return last


def joins_texts(model: LanguageModel) -> bool:
    """Whether a model gives texts in one batch, padded at the beginning, their own logits.

    Tested on one text of several tokens and one of a few: kernels and positions may not allow it.
    """
    if not (model.cached and model.masked):
        return False
    batch = Batch(model)
    alone = []
    try:
        for length in (len(_PROBE) - 1, 2):
            context = Context(model)
            context.read(_PROBE[:length])
            batch.join(context)
            alone.append(context.read(_PROBE[-1:]))
        together = batch.read([_PROBE[-1]] * 2)
        batch.leave(0)
        after = batch.read(_PROBE[:1])[0], context.read(_PROBE[:1])
    except QaloraError:
        return False
    return all(
        float(abs(one - other).max()) <= _SAME * max(1.0, float(abs(other).max()))
        for one, other in (*zip(together, alone, strict=True), after)
    )


def _joined(caches: Sequence[Mapping[str, Any]], width: int) -> dict[str, Any]:
    """Caches as one, each padded at its beginning to `width` tokens."""
    import numpy as np

    def join(*values: NDArray[Any]) -> NDArray[Any]:
        first = values[0]
        rows = sum(len(value) for value in values)
        joined = np.zeros((rows, first.shape[1], width, first.shape[3]), first.dtype)
        begin = 0
        for value in values:
            joined[begin : begin + len(value), :, width - value.shape[2] :] = value
            begin += len(value)
        return joined

    return _map(caches[0], join, *caches[1:])


def _map(cache: Mapping[str, Any], change: Any, *others: Mapping[str, Any]) -> dict[str, Any]:
    """A function of the arrays of caches, by input name."""
    import numpy as np

    runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
    made = runtime.OrtValue.ortvalue_from_numpy
    return {
        name: made(
            np.ascontiguousarray(change(value.numpy(), *(other[name].numpy() for other in others)))
        )
        for name, value in cache.items()
    }
