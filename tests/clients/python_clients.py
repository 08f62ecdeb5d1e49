"""Run by the interpreter of the Python clients: opens a folder and prints what it computes."""

from __future__ import annotations

import json
import sys
from typing import Any


def optimum_tokens(folder: str, prompt: str, tokens: str) -> list[int]:
    """Greedy tokens of optimum-onnx."""
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = ORTModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    found = model.generate(ids, max_new_tokens=int(tokens), do_sample=False)
    return [int(token) for token in found[0]]


def sentence_vectors(folder: str, *texts: str) -> list[list[float]]:
    """Vectors of sentence-transformers' ONNX back-end."""
    from sentence_transformers import SentenceTransformer

    found: Any = SentenceTransformer(folder, backend="onnx").encode(list(texts))
    return [[float(value) for value in row] for row in found]


if __name__ == "__main__":
    chosen = {f.__name__: f for f in (optimum_tokens, sentence_vectors)}[sys.argv[1]]
    print(json.dumps(chosen(*sys.argv[2:])))
