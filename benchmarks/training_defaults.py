"""How the defaults of training were chosen: pooling, learning rate, scaling, rate of B to A.

Measures held-out loss and accuracy after a short training on the topics of BBC articles, in 4 bits
in groups of 32: of SmolLM2-135M, which writes the topic's name, or of MiniLM with a new head of
float weights that trains together with the adapters. It compares

* each pooling at several learning rates (`pooling`);
* alpha at one rank, and rank-stabilised scaling (`scaling`);
* B learning faster than A (`ratio`).

Every row starts from the same quantized weights, and the rows of one seed see the same batches.
Needs the packages that `examples/assets.py` fetches.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import qalora_compile as qc
from qalora_compile.capture.classifier import linear_layers, load_classifier
from qalora_compile.capture.load_source import load_source
from qalora_compile.config import POOLINGS
from qalora_compile.training import Example, FitSpec, evaluate, fit, load_examples
from qalora_compile.training.evaluate import program_forward

EXAMPLES = """examples:
  python -m benchmarks.training_defaults --json defaults.json
  python -m benchmarks.training_defaults --model minilm --steps 48
  python -m benchmarks.training_defaults --parts pooling --rates 1e-3 3e-3 --steps 24 --seeds 3
"""
PARTS = ("pooling", "scaling", "ratio")
_BASE = qc.AdapterSpec()
_WORDS = 45
"""Of an article, for MiniLM."""


@dataclass(frozen=True)
class Row:
    """One training.

    `largest` is the largest norm of a gradient before clipping.
    """

    part: str
    pooling: str
    alpha: float
    rslora: bool
    rate: float
    ratio: float
    seed: int
    loss: float
    accuracy: float
    first: float
    last: float
    largest: float
    seconds: float


@dataclass(frozen=True)
class Bench:
    """The quantized model, the data, its head, and the ids of the topics' first tokens."""

    quantized: qc.Program
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    head: tuple[str, ...]
    choices: list[int] | None
    options: argparse.Namespace

    def row(self, part: str, adapter: qc.AdapterSpec, fitting: FitSpec) -> Row:
        """Train and measure."""
        started = time.monotonic()
        adapter = dataclasses.replace(adapter, seed=fitting.seed)
        program = qc.insert_adapters(self.quantized, adapter, train=self.head)
        norms: list[float] = []

        def note(report: Any, _: Any) -> bool:
            norms.append(report.grad_norm)
            return False

        losses = fit(program, self.train, fitting, on_step=note).losses
        found = evaluate(program_forward(program), self.held_out, choices=self.choices)
        right = found.exact_match if found.choice_accuracy is None else found.choice_accuracy
        return Row(
            part=part,
            pooling=adapter.pooling,
            alpha=adapter.alpha,
            rslora=adapter.use_rslora,
            rate=fitting.learning_rate,
            ratio=fitting.lora_plus_ratio,
            seed=fitting.seed,
            loss=found.loss,
            accuracy=right,
            first=losses[0],
            last=losses[-1],
            largest=max(norms),
            seconds=time.monotonic() - started,
        )


def load(options: argparse.Namespace) -> Bench:
    """The model, quantized once, and its data."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    return load_minilm(options) if options.model == "minilm" else load_smollm2(options)


def load_minilm(options: argparse.Namespace) -> Bench:
    """An encoder that tells topics apart."""
    from assets import TOPICS, articles, encoder_path

    source = load_classifier(str(encoder_path()), TOPICS, seed=0)
    rows = [{"text": " ".join(text.split()[:_WORDS]), "label": topic} for text, topic in articles()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        data = load_examples(file, source.tokenizer, max_length=64, classes=TOPICS).examples
    held_out, train = data[: options.held_out], data[options.held_out :][: options.train]
    seen = {example.tokens for example in held_out}
    fresh = tuple(example for example in train if example.tokens not in seen)
    quantized = qc.quantize_groups(
        source.capture(), exclude=linear_layers(source.model, source.head)
    )
    return Bench(quantized, fresh, tuple(held_out), source.head, None, options)


def load_smollm2(options: argparse.Namespace) -> Bench:
    """A language model that writes the topic."""
    from assets import TOPICS, model_path, write_topic_data

    source = load_source(str(model_path()))
    with tempfile.TemporaryDirectory() as folder:
        files = write_topic_data(source.tokenizer, Path(folder), train=options.train)
        train, held_out = (
            tuple(load_examples(file, source.tokenizer, max_length=128).examples) for file in files
        )
    choices = [source.tokenizer(f" {topic}").input_ids[0] for topic in TOPICS]
    quantized = qc.quantize_groups(source.capture())
    return Bench(quantized, train, held_out[: options.held_out], (), choices, options)


def rows(bench: Bench) -> Iterator[Row]:
    """The measurements that are asked for."""
    options = bench.options
    for seed in range(options.seeds):
        fitting = FitSpec(
            steps=options.steps, batch_size=options.batch, seed=seed, learning_rate=options.rate
        )
        if "pooling" in options.parts:
            for pooling in POOLINGS:
                for rate in options.rates:
                    spec = dataclasses.replace(fitting, learning_rate=rate)
                    yield bench.row("pooling", dataclasses.replace(_BASE, pooling=pooling), spec)
        if "scaling" in options.parts:
            for alpha, rslora in ((8.0, False), (32.0, False), (128.0, False), (8.0, True)):
                scaled = dataclasses.replace(_BASE, alpha=alpha, use_rslora=rslora)
                yield bench.row("scaling", scaled, fitting)
        if "ratio" in options.parts:
            for ratio in (1.0, 4.0, 16.0):
                spec = dataclasses.replace(fitting, lora_plus_ratio=ratio)
                yield bench.row("ratio", _BASE, spec)


def main() -> None:
    """Measure, and print each row as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "minilm"))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--rate", type=float, default=1e-3, help="of the parts that are not rates")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--train", type=int, default=400, help="articles to train on")
    parser.add_argument("--held-out", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    bench = load(options)
    done: list[Row] = []
    for row in rows(bench):
        done.append(row)
        print(
            f"{row.part:8} {row.pooling:18} alpha {row.alpha:<5g} {'√r' if row.rslora else 'r ':2} "
            f"rate {row.rate:<7g} B/A {row.ratio:<3g} seed {row.seed}: held-out loss "
            f"{row.loss:.3f}, accuracy {row.accuracy:.1%}, largest gradient {row.largest:.3g}, "
            f"{row.seconds:.0f} s",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps([asdict(r) for r in done], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
