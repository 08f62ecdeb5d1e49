"""What `benchmarks.llama_cpp` runs in the Python that has llama-cpp-python; needs nothing of ours.

Reads a job from a JSON file: model, texts, tokens of prompts, number of tokens to generate, and
continuations to be scored. Writes tokens and logits into the same folder.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Run the job."""
    place = Path(sys.argv[1])
    job = json.loads(place.read_text("utf-8"))
    library: Any = importlib.import_module("llama_cpp")
    model = library.Llama(
        model_path=job["model"],
        n_ctx=job["context"],
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        logits_all=True,
        verbose=False,
    )
    found: dict[str, Any] = {"version": library.__version__, "tokens": [], "choices": []}
    found["texts"] = [
        model.tokenize(text.encode("utf-8"), add_bos=False, special=True) for text in job["texts"]
    ]
    for number, (prompt, given) in enumerate(zip(job["prompts"], job["given"], strict=True)):
        found["tokens"].append(generate(model, prompt, job["new"]))
        model.reset()
        model.eval(prompt + given)
        logits = np.array(model.scores[len(prompt) - 1 : model.n_tokens - 1])
        np.save(place.with_name(f"logits-{number}.npy"), logits)
        found["choices"].append([int(token) for token in logits.argmax(-1)])
    place.with_name("found.json").write_text(json.dumps(found), "utf-8")


def generate(model: Any, prompt: list[int], new: int) -> list[int]:
    """The likeliest tokens after a prompt, one after another."""
    model.reset()
    model.eval(prompt)
    tokens: list[int] = []
    while len(tokens) < new:
        token = int(np.argmax(model.scores[model.n_tokens - 1]))
        tokens.append(token)
        model.eval([token])
    return tokens


if __name__ == "__main__":
    main()
