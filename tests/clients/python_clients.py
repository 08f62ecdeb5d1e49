"""Run by the interpreter of the Python clients: opens a folder and prints what it computes."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def optimum_tokens(folder: str, prompt: str, tokens: str) -> list[int]:
    """Greedy tokens of optimum-onnx."""
    model, ids = _optimum(folder, prompt)
    found = model.generate(ids, max_new_tokens=int(tokens), do_sample=False)
    return [int(token) for token in found[0]]


def _optimum(folder: str, prompt: str) -> tuple[Any, Any]:
    """The model, and the tokens of a prompt."""
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = ORTModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": prompt}]
    return model, tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt"
    )


class _Clock:
    """A streamer that notes when it gets the prompt, and then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        """Called by `generate`."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate`."""


def optimum_seconds(edge: str, base: str, prompt: str, tokens: str, rounds: str) -> Any:
    """Seconds of the tokens after the first one, of both models in each round."""
    both = [_optimum(folder, prompt) for folder in (edge, base)]

    def measure(model: Any, ids: Any) -> float:
        clock = _Clock()
        model.generate(ids, max_new_tokens=int(tokens), do_sample=False, streamer=clock)
        return clock.times[-1] - clock.times[1]

    return [[measure(*loaded) for loaded in both] for _ in range(int(rounds))]


def optimum_sequence(folder: str, call: str) -> list[int]:
    """Greedy tokens of an encoder-decoder model; `call` is that of sequences.mjs."""
    import torch
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    asked = json.loads(call)
    model: Any = ORTModelForSeq2SeqLM.from_pretrained(folder)
    found = model.generate(
        torch.tensor([asked["ids"]]),
        decoder_start_token_id=asked["start"],
        max_new_tokens=asked["tokens"],
        do_sample=False,
        eos_token_id=None,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
    )
    return [int(token) for token in found[0]]


def sentence_vectors(folder: str, *texts: str) -> list[list[float]]:
    """Vectors of sentence-transformers' ONNX back-end."""
    from sentence_transformers import SentenceTransformer

    found: Any = SentenceTransformer(folder, backend="onnx").encode(list(texts))
    return [[float(value) for value in row] for row in found]


def sentence_seconds(edge: str, base: str, rounds: str, *texts: str) -> list[list[float]]:
    """Seconds of one call of both models in each round."""
    from sentence_transformers import SentenceTransformer

    both: list[Any] = [SentenceTransformer(folder, backend="onnx") for folder in (edge, base)]

    def measure(model: Any) -> float:
        begin = time.perf_counter()
        model.encode(list(texts))
        return time.perf_counter() - begin

    return [[measure(model) for model in both] for _ in range(int(rounds))]


CLIENTS = (optimum_tokens, optimum_seconds, optimum_sequence, sentence_vectors, sentence_seconds)

if __name__ == "__main__":
    chosen: Any = {f.__name__: f for f in CLIENTS}[sys.argv[1]]
    print(json.dumps(chosen(*sys.argv[2:])))
