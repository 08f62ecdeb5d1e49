"""What a proof costs: an adapted program against its folded one, and that against its exports.

Everything is read from files, one pair after the other in one process. Exits with 1 where a pair is
not proved equal, a part that was only tried on samples included, or where all of it takes two
minutes of wall-clock time or more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import qalora_compile as qc
from qalora_compile.runtime.footprint import peak_memory
from qalora_compile.verdict import PROVEN

EXAMPLES = """examples:
  python -m benchmarks.proof run folded edge
  python -m benchmarks.proof --json run folded ort.onnx ort-stock.onnx onnx.onnx
"""
MOST_SECONDS = 120.0


def measure(reference: Path, candidate: Path) -> dict[str, object]:
    """Prove one pair."""
    wall, cpu = time.monotonic(), time.process_time()
    certificate = qc.prove_equivalence(reference, candidate)
    return {
        "pair": f"{reference.name} → {candidate.name}",
        "verdict": certificate.verdict,
        "conditions": len(certificate.conditions),
        "layers proved": sum(s.status == "proved" for s in certificate.sites),
        "parts proved": sum(s.status == "proved" for s in certificate.segments),
        "parts sampled": sum(s.status == "sampled" for s in certificate.segments),
        "largest |ΔW|": certificate.max_abs,
        "seconds": round(time.monotonic() - wall, 1),
        "CPU seconds": round(time.process_time() - cpu, 1),
        "peak MB": round(peak_memory() / 1e6),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proof",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the adapted program")
    parser.add_argument("folded", type=Path, help="the folded one")
    parser.add_argument("exports", type=Path, nargs="*", help="exports of the folded one")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    pairs = [(options.run, options.folded), *((options.folded, e) for e in options.exports)]
    begin = time.monotonic()
    rows = [measure(*pair) for pair in pairs]
    total = time.monotonic() - begin
    if options.json:
        print(json.dumps({"rows": rows, "seconds": total}))
    else:
        table = Table(*rows[0], title=f"{total:.0f} s in all, at most {MOST_SECONDS:.0f}")
        for row in rows:
            values = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
            table.add_row(*values)
        Console().print(table)
    equal = all(row["verdict"] in PROVEN for row in rows)
    return 0 if equal and total < MOST_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
