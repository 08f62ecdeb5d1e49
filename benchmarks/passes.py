"""What the passes cost as a model gets deeper, compared with torch.export's own time.

A Llama of small width (random weights) is captured at several depths, and every pass of the route
to `ort-stock` is timed on it. All depths are measured in each of three rounds, one after the other,
and medians are reported, so that a slow period of the machine does not affect only one depth.

"Pass time" is everything that a pass does (checks of its input and result included), except
choosing codes, scales and offsets (quantize-groups) and repacking them (legalize-ort-stock). That
is arithmetic on weights, grows with their size and not with the graph, and has a row of its own
(`numbers`). What the other passes compute on tensors counts as theirs. `python code`, the last row,
is the time torch.fx needs to compile the final graph when it is first called; passes do not.

Exits with 1 where a doubling of the layers costs more than 2.2 times, or where all passes together
take a tenth of torch.export's time or more.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import qalora_compile as qc
from qalora_compile.capture.export import export_model_graph
from qalora_compile.progress import listening

EXAMPLES = """examples:
  python -m benchmarks.passes
  python -m benchmarks.passes --layers 12 24 --rounds 1
  python -m benchmarks.passes --json > passes.json
"""
LAYERS = (12, 24, 48, 96)
ROUNDS = 3
MOST_PER_DOUBLING = 2.2
MOST_OF_EXPORT = 0.10
T = TypeVar("T")
EXPORT, NUMBERS, CODE, TOTAL = "torch.export", "numbers", "python code", "all passes"
PIPELINE = (
    "canonicalize-pointwise,annotate-linears,quantize-groups,insert-adapters{rank=4},"
    "share-group-sums,fold-adapters,legalize-ort-stock,share-group-sums"
)


def llama(layers: int) -> nn.Module:
    """A Llama of width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


@dataclass
class _Numbers:
    """Listens for the loops that choose and repack codes, and sums up their time."""

    seconds: float = 0.0
    _started: float = field(default=0.0, init=False)

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in ("quantize", "legalize"):
            return
        if done == 0:
            self._started = time.perf_counter()
        elif done == total:
            self.seconds += time.perf_counter() - self._started


Captured = tuple[nn.Module, torch.Tensor, qc.Program]


def capture(layers: int) -> Captured:
    """A model of that depth, its example input, and the program that passes start from."""
    torch.manual_seed(0)
    model, ids = llama(layers), torch.randint(0, 128, (2, 8))
    return model, ids, qc.capture_model(model, (ids,))


def measure(captured: Captured) -> dict[str, float]:
    """Seconds of torch.export, of each pass and of work on numbers, for one depth."""
    model, ids, program = captured
    seconds: dict[str, float] = {}
    _, seconds[EXPORT] = _timed(partial(export_model_graph, model, (ids,), {}, None, []))
    numbers = _Numbers()
    with listening(numbers):
        for step in qc.Pipeline.parse(PIPELINE).passes:
            before = numbers.seconds
            result, spent = _timed(partial(step, program))
            program = result.program
            graph_work = spent - (numbers.seconds - before)
            seconds[step.name] = seconds.get(step.name, 0.0) + graph_work
    seconds[TOTAL] = sum(value for name, value in seconds.items() if name != EXPORT)
    _, code = _timed(lambda: program.module.forward)
    return seconds | {NUMBERS: numbers.seconds, CODE: code}


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """Run without garbage collection, as `timeit` does: it would scan the other depths' graphs."""
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        result = work()
        return result, time.perf_counter() - started
    finally:
        gc.enable()


@dataclass(frozen=True)
class Result:
    """Medians by depth, and what they say.

    Attributes:
        seconds: Depth → what → median seconds.
    """

    seconds: dict[int, dict[str, float]]

    @property
    def depths(self) -> list[int]:
        """The depths, ascending."""
        return sorted(self.seconds)

    @property
    def per_doubling(self) -> dict[str, float]:
        """What → the largest factor that a doubling of the layers cost."""
        pairs = [(n, 2 * n) for n in self.depths if 2 * n in self.seconds]
        return {
            what: max(self.seconds[b][what] / self.seconds[a][what] for a, b in pairs)
            for what in (self.seconds[self.depths[0]] if pairs else ())
        }

    @property
    def share(self) -> dict[int, float]:
        """Depth → time of all passes as a part of torch.export's."""
        return {n: row[TOTAL] / row[EXPORT] for n, row in self.seconds.items()}

    @property
    def misses(self) -> list[str]:
        """The targets that were missed."""
        factor = self.per_doubling.get(TOTAL, 0.0)
        missed = [f"a doubling costs {factor:.2f}×, more than {MOST_PER_DOUBLING}×"]
        missed = missed if factor > MOST_PER_DOUBLING else []
        return missed + [
            f"at {n} layers passes take {share:.1%} of torch.export, not below {MOST_OF_EXPORT:.0%}"
            for n, share in self.share.items()
            if share >= MOST_OF_EXPORT
        ]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "seconds": self.seconds,
            "largest factor per doubling": self.per_doubling,
            "share of torch.export": self.share,
            "misses": self.misses,
        }


def run(depths: Sequence[int], rounds: int, console: Console) -> Result:
    """Measure all depths in every round, and take medians."""
    rows: dict[int, list[dict[str, float]]] = {n: [] for n in depths}
    with Progress(console=console) as bar:
        task = bar.add_task("layers measured", total=(rounds + 1) * sum(depths))
        programs = {}
        for n in depths:
            programs[n] = capture(n)
            bar.advance(task, n)
        for _ in range(rounds):
            for n in depths:
                rows[n].append(measure(programs[n]))
                bar.advance(task, n)
    return Result(
        {
            n: {what: statistics.median(row[what] for row in several) for what in several[0]}
            for n, several in rows.items()
        }
    )


def table_of(result: Result) -> Table:
    """One row a pass, one column a depth, in milliseconds."""
    table = Table(title="milliseconds, medians", title_justify="left")
    table.add_column("")
    for n in result.depths:
        table.add_column(f"{n} layers", justify="right")
    table.add_column("largest ×, 2 × layers", justify="right")
    factors = result.per_doubling
    for what in result.seconds[result.depths[0]]:
        cells = [f"{1000 * result.seconds[n][what]:.1f}" for n in result.depths]
        table.add_row(what, *cells, f"{factors[what]:.2f}" if factors else "")
    shares = [f"{100 * result.share[n]:.1f} %" for n in result.depths]
    table.add_row(f"{TOTAL} / {EXPORT}", *shares, "")
    return table


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.passes",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="default: 3")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(words)
    if min(*options.layers, options.rounds, 1) < 1:
        parser.error("layers and rounds are 1 or more")
    torch.set_num_threads(1)
    result = run(sorted(set(options.layers)), options.rounds, Console(stderr=True))
    if options.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        Console().print(table_of(result))
    for miss in result.misses:
        print(f"MISSED: {miss}", file=sys.stderr)
    return 1 if result.misses else 0


if __name__ == "__main__":
    raise SystemExit(main())
