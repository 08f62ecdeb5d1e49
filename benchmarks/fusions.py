"""The forms of a transformer's norms and attention in ONNX Runtime: `--fusion none, standard, ort`.

A Llama with the shape of SmolLM2-135M and random weights, quantized to 4 bits in groups of 32, is
exported in each form with its key-value cache. All sessions, with the operator library and on stock
kernels, are alternated in one process; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import qalora_compile as qc
from benchmarks.export_time import write_checkpoint
from qalora_compile.capture.lazy_folder import capture_checkpoint
from qalora_compile.config import FUSIONS
from qalora_compile.runtime import LanguageModel, kernel_level, open_session
from qalora_compile.runtime.footprint import time_tokens

EXAMPLES = """examples:
  python -m benchmarks.fusions
  python -m benchmarks.fusions --layers 4 --rounds 3 --threads 1 --json fusions.json
"""
PROMPTS, AFTER, DECODE = (16, 128, 512), (16, 512), 8


@dataclass(frozen=True)
class Row:
    """Milliseconds of a prompt, and of a token after one, by the tokens before; medians."""

    form: str
    nodes: int
    prompts: dict[int, float]
    tokens: dict[int, float]


def export(layers: int, folder: Path) -> dict[str, tuple[Path, int]]:
    """Each way's model, and its number of nodes."""
    write_checkpoint(layers, folder / "checkpoint")
    program = qc.quantize_groups(capture_checkpoint(folder / "checkpoint"))
    made = {}
    for fusion in FUSIONS:
        path = folder / f"{fusion}.onnx"
        report = qc.export_model(program, path, qc.ExportSpec(fusion=fusion))
        made[fusion] = path, report.nodes
    return made


def measure(made: dict[str, tuple[Path, int]], threads: int, rounds: int) -> list[Row]:
    """Alternate all forms; the first round warms up."""
    libraries = (True, False) if kernel_level() is not None else (False,)
    models = {
        (fusion, library): LanguageModel(open_session(path, threads=threads, library=library))
        for library in libraries
        for fusion, (path, _) in made.items()
    }
    prompts = {key: {n: list[float]() for n in PROMPTS} for key in models}
    tokens = {key: {n: list[float]() for n in AFTER} for key in models}
    for number in range(rounds + 1):
        for length in PROMPTS:
            for key, model in models.items():
                first, each = time_tokens(model, length, DECODE if length in AFTER else 0)
                if number:
                    prompts[key][length].append(1e3 * first)
                    if length in AFTER:
                        tokens[key][length].append(1e3 * each)
    return [
        Row(
            form=f"{fusion}, {'operator library' if library else 'stock kernels'}",
            nodes=made[fusion][1],
            prompts={n: statistics.median(t) for n, t in prompts[fusion, library].items()},
            tokens={n: statistics.median(t) for n, t in tokens[fusion, library].items()},
        )
        for fusion, library in models
    ]


def show(rows: Sequence[Row]) -> None:
    """One table."""
    heads = [f"prompt {n}" for n in PROMPTS] + [f"token after {n}" for n in AFTER]
    print(f"{'milliseconds':28} {'nodes':>6} " + " ".join(f"{head:>15}" for head in heads))
    for row in rows:
        values = [*row.prompts.values(), *row.tokens.values()]
        print(f"{row.form:28} {row.nodes:6} " + " ".join(f"{value:15.1f}" for value in values))


def main(words: Sequence[str] | None = None) -> None:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fusions",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name:
        rows = measure(export(options.layers, Path(name)), options.threads, options.rounds)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")


if __name__ == "__main__":
    main()
