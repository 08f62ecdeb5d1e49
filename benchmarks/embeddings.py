"""What quantized embeddings and heads save and cost, on SmolLM2-135M: bytes, speed, perplexity.

The layers always have 4 bits in groups of 32; the embedding, tied to the head, has float32, 8 or 4
bits. Each form is exported with a key-value cache, and sessions are alternated token by token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import qalora_compile as qc
from qalora_compile.capture.load_source import load_source
from qalora_compile.runtime import LanguageModel, kernel_level, open_session

EXAMPLES = Path(__file__).parents[1] / "examples"
FORMS = {"float32": None, "8 bits": 8, "4 bits": 4}


def export_forms(scratch: Path) -> tuple[dict[str, Path], list[list[int]]]:
    """The exported forms, and held-out texts as tokens."""
    sys.path.insert(0, str(EXAMPLES))
    from assets import model_path, write_topic_data

    source = load_source(str(model_path()))
    _, held_out = write_topic_data(source.tokenizer, scratch, train=8)
    captured, found = source.capture(), {}
    for name, bits in FORMS.items():
        embeddings = None if bits is None else qc.QuantSpec(bits=bits)
        program = qc.quantize_groups(captured, embeddings=embeddings)
        found[name] = scratch / name.replace(" ", "") / "model.onnx"
        found[name].parent.mkdir()
        qc.export_model(qc.add_kv_cache(program, source.model), found[name])
    lines = held_out.read_text("utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    return found, [source.tokenizer(prompt).input_ids for prompt in prompts]


def perplexity(model: LanguageModel, texts: Sequence[Sequence[int]]) -> tuple[float, int]:
    """E to the mean loss of every next token, and how many there were."""
    losses: list[float] = []
    for tokens in texts:
        logits = model.logits(np.array([tokens], np.int64))[0, :-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        total = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        losses += list(total - logits[np.arange(len(tokens) - 1), tokens[1:]])
    return float(np.exp(np.mean(losses))), len(losses)


def decode_times(models: dict[Any, LanguageModel], count: int) -> dict[Any, list[float]]:
    """Seconds of each next token of each form, after a prompt of 16; one form after another."""
    prompt, times = np.arange(5, 21)[None], {name: list[float]() for name in models}
    states = {}
    for name, model in models.items():
        states[name] = model.step(prompt, np.ones((1, 16), np.int64), model.empty_cache())
    for step in range(count):
        for name, model in models.items():
            token = states[name][0][0, -1].argmax()[None, None]
            mask = np.ones((1, 17 + step), np.int64)
            started = time.perf_counter()
            states[name] = model.step(token, mask, states[name][1])
            times[name].append(time.perf_counter() - started)
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="decoded by each form")
    parser.add_argument("--texts", type=int, default=8, metavar="N", help="held-out articles")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        paths, texts = export_forms(Path(folder))
        libraries = {"stock": False} | ({"library": True} if kernel_level() else {})
        models = {
            (name, kernels): LanguageModel(open_session(path, library=use, threads=1))
            for name, path in paths.items()
            for kernels, use in libraries.items()
        }
        times = decode_times(models, options.tokens)
        print(f"{'':8} {'MB':>6}  " + "  ".join(f"{k + ' tok/s':>24}" for k in libraries), end="")
        print("  perplexity")
        for name, path in paths.items():
            size = sum(f.stat().st_size for f in path.parent.iterdir())
            speeds = [_rates(times[name, kernels]) for kernels in libraries]
            value, count = perplexity(models[name, "stock"], texts[: options.texts])
            print(f"{name:8} {size / 1e6:6.1f}  {'  '.join(speeds)}  {value:.3f} ({count} tokens)")


def _rates(seconds: list[float]) -> str:
    """Tokens a second: median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{1 / middle:6.1f} ({1 / high:5.1f} to {1 / low:5.1f})"


if __name__ == "__main__":
    main()
