"""Time a complete language model in ONNX Runtime: merged (library, stock kernels) and unmerged.

A Llama of random weights, larger than the cache, quantized to 4 bits in groups of 32 with adapters
of rank 16, is exported in every form; the sessions, each on one thread, are alternated in one
process. A number is the median over the rounds of a form's time, and of its ratio to the unmerged
adapters on stock kernels of the same accuracy level. The forward pass has no key-value cache: one
token is one step of decoding without attention to a past.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qalora_compile as qc
from benchmarks.ratios import ratios
from qalora_compile.runtime import kernel_level, open_session

EXAMPLES = """examples:
  python -m benchmarks.ort_model
  python -m benchmarks.ort_model --layers 2 --tokens 1 128 --json model.json
"""
UNMERGED, STOCK, FLOAT = "adapters unmerged, stock kernels", "merged, stock kernels", "float32"
REACH_UNMERGED, REACH_FLOAT = 0.75, 1 / 3


@dataclass(frozen=True)
class Row:
    """One form at one number of tokens; `reach` is what the ratio should not exceed."""

    tokens: int
    level: str
    form: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    of_float: float
    megabytes: float


def build(layers: int, hidden: int) -> tuple[qc.Program, qc.Program]:
    """The float program, and the adapted one with adapters that have values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    ids = torch.randint(0, 1024, (1, 16))
    model = LlamaForCausalLM(config).eval()
    original = qc.capture_model(model, (ids,), {"use_cache": False})
    program = qc.insert_adapters(qc.quantize_groups(original), qc.AdapterSpec(rank=16))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in program.adapter_parameters():
            parameter.normal_(0, 0.01, generator=generator)
    return original, program


def forms(
    original: qc.Program, program: qc.Program, folder: Path, level: int
) -> Iterator[tuple[str, Any, float]]:
    """Each form's name, session and size in megabytes, at one accuracy level."""
    folded = qc.fold_adapters(program)

    def export(name: str, source: qc.Program, **options: Any) -> tuple[Path, float]:
        path = folder / f"{name}-{level}.onnx"
        report = qc.export_model(source, path, qc.ExportSpec(accuracy_level=level, **options))
        return path, report.size_bytes / 1e6

    def session(path: Path, *, library: bool) -> Any:
        return open_session(path, threads=1, library=library)

    path, size = export("float", original, allow_unfolded=True)
    yield FLOAT, session(path, library=False), size
    path, size = export("unmerged", program, target="ort-stock", allow_unfolded=True)
    yield UNMERGED, session(path, library=False), size
    path, size = export("digits", folded, target="ort-stock", correction="digits")
    yield "merged, stock kernels, digits", session(path, library=False), size
    for dtype in ("float32", "float16"):
        path, size = export(dtype, folded, parameter_dtype=dtype)
        if dtype == "float32":
            yield STOCK, session(path, library=False), size
        if kernel_level() is not None:
            yield f"merged, library, {dtype} s/z", session(path, library=True), size


def measure(
    sessions: Sequence[tuple[str, Any, float]], tokens: int, rounds: int, level: int
) -> list[Row]:
    """Alternate the sessions."""
    ids = np.random.default_rng(0).integers(0, 1024, (1, tokens))
    times: dict[str, list[float]] = {name: [] for name, _, _ in sessions}
    for _ in range(rounds + 1):
        for name, session, _ in sessions:
            begin = time.perf_counter()
            session.run(None, {"input_ids": ids})
            times[name].append(time.perf_counter() - begin)
    taken = {name: values[1:] for name, values in times.items()}
    rows = []
    for name, _, size in sessions:
        ratio = ratios(taken[name], taken[UNMERGED])
        typical = statistics.median(taken[name])
        rows.append(
            Row(
                tokens=tokens,
                level="int8" if level else "fp32",
                form=name,
                milliseconds=1e3 * typical,
                ratio=ratio.median,
                low=ratio.low,
                high=ratio.high,
                of_float=typical / statistics.median(taken[FLOAT]),
                megabytes=size,
            )
        )
    return rows


def show(rows: Sequence[Row]) -> None:
    """One table."""
    first = rows[0]
    print(f"\n{first.tokens} token(s), {first.level} compute", flush=True)
    print(f"  {'':36} {'ms':>9} {'ratio':>6} {'quartiles':>12} {'/ float':>8} {'MB':>6}")
    for row in rows:
        print(
            f"  {row.form:36} {row.milliseconds:9.2f} {row.ratio:6.3f} "
            f"{row.low:6.3f}-{row.high:.3f} {row.of_float:8.3f} {row.megabytes:6.0f}",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, export, measure, print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048, help="width, a multiple of 64")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    original, program = build(options.layers, options.hidden)
    measured: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for level in (4, 0):
            sessions = list(forms(original, program, Path(scratch), level))
            for tokens in options.tokens:
                rounds = options.rounds if tokens < 32 else max(3, options.rounds // 3)
                rows = measure(sessions, tokens, rounds, level)
                show(rows)
                measured += rows
    fastest = {
        row.level: row for row in measured if row.tokens == 1 and row.form.endswith("float16 s/z")
    }
    for name, row in fastest.items():
        print(
            f"{name}: decode {row.ratio:.2f} of unmerged (reach {REACH_UNMERGED}), "
            f"{1 / row.of_float:.1f}× as fast as float32 (reach {1 / REACH_FLOAT:.0f}×)"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in measured], indent=1), "utf-8")


if __name__ == "__main__":
    main()
