"""Run by the interpreter of one release of ONNX Runtime: models, inputs, and their outputs.

python run_models.py MODELS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

ACCURACY = "session.qdq_matmulnbits_accuracy_level"


def error_of(row: dict[str, Any]) -> float:
    """The largest error of an output, relative to its largest value."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry(ACCURACY, "0")
    session = onnxruntime.InferenceSession(
        row["model"], options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    with np.load(row["call"], allow_pickle=False) as call:
        feed = {leaf.name: call[f"in {leaf.name}"] for leaf in session.get_inputs()}
        found = session.run(names, feed)
        wanted = [call[f"out {name}"] for name in names]
    pairs = zip(found, wanted, strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs if b.size)


def main(listed: str) -> int:
    """Run all models; returns 1 if one does not load or computes something else."""
    rows, failed, worst = json.loads(Path(listed).read_text("utf-8")), 0, 0.0
    for row in rows:
        try:
            error = error_of(row)
        except Exception as fault:  # onnxruntime's types have no common base class
            print(f"{onnxruntime.__version__}: {row['what']}: {str(fault).splitlines()[0]}")
            failed += 1
            continue
        worst = max(worst, error if row["limit"] < 1e-3 else 0.0)
        if not error <= row["limit"]:
            print(f"{onnxruntime.__version__}: {row['what']}: error {error:.1e}")
            failed += 1
    total = len(rows)
    print(f"onnxruntime {onnxruntime.__version__}: {total - failed} of {total}, error {worst:.0e}")
    return int(failed > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
