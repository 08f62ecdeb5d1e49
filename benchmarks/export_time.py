"""Where the time of an export with a key-value cache goes, and how it grows with the layers.

A Llama with the widths of SmolLM2-135M and random weights is saved as a checkpoint and takes the
route of `qalora-compile quantize`: capture with the cache, passes (on shapes), translation to ONNX,
and writing, where the weights are read and quantized. Depths are alternated; figures are medians.

Exits with 1 where 30 layers take more than 60 s, where passes take a tenth of the total or more, or
where a doubling of the layers costs more than 2.2 times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

import qalora_compile as qc
from benchmarks.export_memory import SHAPES
from qalora_compile.api import complete_spec, lower
from qalora_compile.capture.lazy_folder import capture_checkpoint
from qalora_compile.exporters.onnx.model import translate
from qalora_compile.exporters.onnx.write import write_translated

EXAMPLES = """examples:
  python -m benchmarks.export_time
  python -m benchmarks.export_time --layers 15 30 60 --rounds 1 --json export_time.json
"""
CAPTURE, PASSES, TRANSLATE, WRITE, TOTAL = "capture", "passes", "translate", "write", "all"
DEPTH, MOST_SECONDS, MOST_OF_ALL, MOST_PER_DOUBLING = 30, 60.0, 0.10, 2.2
T = TypeVar("T")


def write_checkpoint(layers: int, folder: Path) -> None:
    """A checkpoint of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, _, heads, kv_heads, vocabulary, tied = SHAPES["135M"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(checkpoint: Path, out: Path, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each phase of one export."""
    seconds: dict[str, float] = {}

    def timed(phase: str, work: Callable[[], T]) -> T:
        begin = clock()
        result = work()
        seconds[phase] = clock() - begin
        return result

    captured = timed(CAPTURE, lambda: capture_checkpoint(checkpoint))
    spec = complete_spec(captured, qc.ExportSpec(overwrite=True))
    lowered = timed(PASSES, lambda: lower(qc.quantize_groups(captured), spec))
    model = timed(TRANSLATE, lambda: translate(lowered, spec))
    timed(WRITE, lambda: write_translated(model, lowered, out / "model.onnx", spec))
    return seconds | {TOTAL: sum(seconds.values())}


@dataclass(frozen=True)
class Result:
    """Layers → phase → median seconds."""

    seconds: dict[int, dict[str, float]]

    @property
    def misses(self) -> list[str]:
        """The targets that were missed."""
        found = [
            f"a doubling from {n} layers costs {factor:.2f}×, more than {MOST_PER_DOUBLING}×"
            for n, row in self.seconds.items()
            if 2 * n in self.seconds
            and (factor := self.seconds[2 * n][TOTAL] / row[TOTAL]) > MOST_PER_DOUBLING
        ]
        found += [
            f"at {n} layers passes take {share:.1%} of all, not below {MOST_OF_ALL:.0%}"
            for n, row in self.seconds.items()
            if (share := row[PASSES] / row[TOTAL]) >= MOST_OF_ALL
        ]
        total = self.seconds.get(DEPTH, {}).get(TOTAL, 0.0)
        if total > MOST_SECONDS:
            found.append(f"{DEPTH} layers take {total:.0f} s, more than {MOST_SECONDS:.0f}")
        return found


def run(layers: Sequence[int], rounds: int, clock: Callable[[], float]) -> Result:
    """Alternate the depths; the first, short export warms up."""
    rows: dict[int, list[dict[str, float]]] = {n: [] for n in layers}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for n in {1, *layers}:
            write_checkpoint(n, scratch / f"{n}")
        measure(scratch / "1", scratch, clock)
        for _ in range(rounds):
            for n in layers:
                rows[n].append(measure(scratch / f"{n}", scratch, clock))
    return Result(
        {
            n: {phase: statistics.median(row[phase] for row in several) for phase in several[0]}
            for n, several in rows.items()
        }
    )


def show(result: Result) -> None:
    """One row a phase, one column a depth."""
    depths = list(result.seconds)
    print(f"{'seconds':10}" + "".join(f"{n:>6} layers" for n in depths))
    for phase in (CAPTURE, PASSES, TRANSLATE, WRITE, TOTAL):
        cells = "".join(f"{result.seconds[n][phase]:13.2f}" for n in depths)
        print(f"{phase:10}{cells}")


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export_time",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[15, DEPTH], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument(
        "--cpu", action="store_true", help="processor time: on a machine that does other work too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(words)
    if min(*options.layers, options.rounds, 1) < 1:
        parser.error("layers and rounds are 1 or more")
    clock = time.process_time if options.cpu else time.perf_counter
    result = run(sorted(set(options.layers)), options.rounds, clock)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result.seconds, indent=1), "utf-8")
    for miss in result.misses:
        print(f"MISSED: {miss}", file=sys.stderr)
    return 1 if result.misses else 0


if __name__ == "__main__":
    raise SystemExit(main())
