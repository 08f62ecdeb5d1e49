"""What a good start is worth: SVD initialisation, ranks and bits within a budget, on SmolLM2-135M.

Measures perplexity on held-out BBC articles of

* adapters that start at zero and as the best foldable correction, for ranks and bits (`start`);
* one rank for all layers, and ranks distributed over them, at equal parameters (`ranks`);
* one width for all codes, and widths distributed over the layers, at equal bytes (`bits`);

and the held-out loss of a short training on their topics from each start (`train`). Calibration
data are other articles. The model itself is stored in 4 bits in groups of 32, so only larger groups
or fewer bits lose something. Needs the packages that `examples/assets.py` fetches.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import qalora_compile as qc
from qalora_compile.capture.load_source import Source, load_source
from qalora_compile.training import FitSpec, evaluate, fit, load_examples
from qalora_compile.training.calibration import calibration_calls
from qalora_compile.training.data.example import Example
from qalora_compile.training.evaluate import program_forward

EXAMPLES = """examples:
  python -m benchmarks.initialisation
  python -m benchmarks.initialisation --parts start ranks --bits 3 --ranks 4 --json start.json
  python -m benchmarks.initialisation --parts train --steps 24
"""
PARTS = ("start", "ranks", "bits", "train")


@dataclass(frozen=True)
class Row:
    """One measurement.

    `mean` is the mean width of a code, `parameters` the number of those of all adapters.
    """

    part: str
    form: str
    bits: str
    groups: str
    rank: str
    perplexity: float
    mean: float
    parameters: int
    megabytes: float
    training: str = ""


@dataclass(frozen=True)
class Bench:
    """The model and its data."""

    source: Source
    captured: qc.Program
    held_out: tuple[Example, ...]
    calls: list[dict[str, Any]]
    options: argparse.Namespace

    @property
    def quant(self) -> qc.QuantSpec:
        """How weights are quantized, but for the bits; the offsets as the method leaves them."""
        return qc.QuantSpec(
            group_size=self.options.group_size, method=self.options.method, refine_offsets=False
        )

    def quantize(self, **changes: Any) -> qc.Program:
        """Quantized as the options say, with changes."""
        spec = dataclasses.replace(self.quant, **changes)
        calls = self.calls if spec.bits == "auto" or spec.method == "gptq" else None
        exclude = [f"model.layers.{number}.*" for number in self.options.in_float]
        return qc.quantize_groups(self.captured, spec, calibration=calls, exclude=exclude)

    def adapt(self, program: qc.Program, **adapter: Any) -> qc.Program:
        """With adapters."""
        return qc.insert_adapters(
            program, qc.AdapterSpec(**adapter), source=self.captured, calibration=self.calls
        )

    def row(self, part: str, form: str, program: qc.Program, training: str = "") -> Row:
        """Measure a program."""
        loss = evaluate(program_forward(program), self.held_out, batch_size=8).loss
        rows = program.plan.weights_to_quantize()
        sizes = [site.n * site.k for site in rows]
        bits = [site.bits or 0 for site in rows]
        ranks = [site.rank or 0 for site in rows]
        codes = (".qweight", ".scale", ".offset")
        stored = (t for n, t in program.tensors().items() if n.endswith(codes))
        return Row(
            part=part,
            form=form,
            bits=_range(bits),
            groups=_range([site.group_size or 0 for site in rows]),
            rank=_range(ranks),
            perplexity=math.exp(loss),
            mean=sum(map(math.prod, zip(bits, sizes, strict=True))) / sum(sizes),
            parameters=sum(p.numel() for p in program.adapter_parameters()),
            megabytes=sum(t.numel() * t.element_size() for t in stored) / 1e6,
            training=training,
        )


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def load(options: argparse.Namespace) -> Bench:
    """The model, articles to measure on and others to calibrate with."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from assets import articles, model_path

    source = load_source(str(model_path()))
    texts = (" ".join(text.split()) for text, _ in articles())
    tokens = (tuple(source.tokenizer(text).input_ids[: options.length]) for text in texts)
    complete = (Example(row, row) for row in tokens if len(row) == options.length)
    held_out = tuple(next(complete) for _ in range(options.articles))
    calibration = [next(complete) for _ in range(options.calibration)]
    captured = source.capture()
    calls = calibration_calls(captured, calibration, len(calibration))
    return Bench(source, captured, held_out, calls, options)


def start(bench: Bench) -> Iterator[Row]:
    """Zeros and SVD, for bits and ranks."""
    for bits in bench.options.bits:
        quantized = bench.quantize(bits=bits)
        yield bench.row("start", "zeros", quantized)
        for rank in bench.options.ranks:
            adapted = bench.adapt(quantized, rank=rank, init="svd")
            yield bench.row("start", "svd", adapted)
        spec = qc.AdapterSpec(rank=max(bench.options.ranks), init="svd")
        blind = qc.insert_adapters(quantized, spec, source=bench.captured)
        yield bench.row("start", "svd, no calibration", blind)


def ranks(bench: Bench) -> Iterator[Row]:
    """One rank, and ranks distributed over the layers at as many parameters."""
    for bits in bench.options.bits:
        quantized = bench.quantize(bits=bits)
        for rank in bench.options.uniform:
            uniform = bench.row("ranks", "uniform", bench.adapt(quantized, rank=rank, init="svd"))
            yield uniform
            budget = uniform.parameters
            adapted = bench.adapt(quantized, rank="auto", rank_budget=budget, init="svd")
            yield bench.row("ranks", "auto", adapted)


def bits(bench: Bench) -> Iterator[Row]:
    """One width, and widths, and groups too, distributed over the layers at as many bytes."""
    for width in bench.options.bits:
        uniform = bench.row("bits", "uniform", bench.quantize(bits=width))
        yield uniform
        if width > 2:  # no width is narrower
            auto = bench.quantize(bits="auto", budget=float(width))
            yield bench.row("bits", "auto", auto)
            size = {"budget": uniform.megabytes, "budget_unit": "megabytes"}
            both = bench.quantize(bits="auto", group_size="auto", **size)
            yield bench.row("bits", "auto, groups too", both)


def train(bench: Bench) -> Iterator[Row]:
    """A short training from each start: the topics of articles."""
    from assets import write_topic_data

    with tempfile.TemporaryDirectory() as folder:
        files = write_topic_data(bench.source.tokenizer, Path(folder), train=480)
        data = [load_examples(f, bench.source.tokenizer, max_length=128).examples for f in files]
    quantized = bench.quantize(bits=bench.options.bits[0])
    rank = bench.options.uniform[-1]
    budget = sum(p.numel() for p in bench.adapt(quantized, rank=rank).adapter_parameters())
    chosen = {"rank": "auto", "rank_budget": budget}
    forms: dict[str, dict[str, Any]] = {
        "uniform, zeros": {"rank": rank},
        "uniform, svd": {"rank": rank, "init": "svd"},
        "auto, zeros": chosen,
        "auto, svd": chosen | {"init": "svd"},
    }
    for seed, (form, adapter) in itertools.product(bench.options.seeds, forms.items()):
        program = bench.adapt(quantized, seed=seed, **adapter)
        spec = FitSpec(steps=bench.options.steps, batch_size=8, learning_rate=1e-3, seed=seed)
        fit(program, data[0], spec)
        after = evaluate(program_forward(program), data[1][: bench.options.held_out])
        yield bench.row("train", form, program, f"seed {seed}: topic loss {after.loss:.4f}")


def show(row: Row) -> None:
    """One line."""
    print(
        f"{row.part:6} {row.form:20} bits {row.bits:>4} ({row.mean:.2f}) group {row.groups:>6} "
        f"rank {row.rank:>5} parameters {row.parameters:>8} {row.megabytes:6.1f} MB  "
        f"perplexity {row.perplexity:10.2f}  {row.training}",
        flush=True,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64], help="of start")
    parser.add_argument("--uniform", type=int, nargs="+", default=[2, 4], help="of ranks, train")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--method", default="minmax")
    parser.add_argument("--articles", type=int, default=16, help="to measure perplexity on")
    parser.add_argument("--calibration", type=int, default=16, help="articles to calibrate with")
    parser.add_argument("--length", type=int, default=128, help="tokens of an article")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of train")
    parser.add_argument("--held-out", type=int, default=80, help="examples of train")
    parser.add_argument("--in-float", type=int, nargs="+", default=[], help="decoder layers")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse(arguments)
    bench = load(options)
    parts: dict[str, Callable[[Bench], Iterator[Row]]] = {
        "start": start,
        "ranks": ranks,
        "bits": bits,
        "train": train,
    }
    float_loss = evaluate(program_forward(bench.captured), bench.held_out, batch_size=8).loss
    print(f"perplexity of the model before quantization: {math.exp(float_loss):.2f}", flush=True)
    measured = []
    for part in options.parts:
        for row in parts[part](bench):
            show(row)
            measured.append(row)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in measured], indent=1), "utf-8")


if __name__ == "__main__":
    main()
