"""How long an exported language model takes."""

from __future__ import annotations

import time

from qalora_compile.runtime.language_model import LanguageModel


def time_tokens(model: LanguageModel, prompt: int, count: int) -> tuple[float, float]:
    """Seconds of a prompt of so many tokens, and of each of `count` tokens after it, 0 for none."""
    import numpy as np

    ids = np.ones((1, prompt), np.int64)
    begin = time.perf_counter()
    _, cache = model.step(ids, np.ones_like(ids), model.empty_cache())
    between = time.perf_counter()
    for total in range(prompt + 1, prompt + count + 1):
        _, cache = model.step(ids[:, :1], np.ones((1, total), np.int64), cache)
    return between - begin, (time.perf_counter() - between) / max(count, 1)
