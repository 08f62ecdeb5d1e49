"""Memory of several fine-tuned models on one base, and the size of a patch.

python -m benchmarks.tuned_sessions                 # SmolLM2-135M, ten sessions
python -m benchmarks.tuned_sessions --sessions 4

Each row is measured in a process of its own: resident memory after the sessions were made and ran
one token, less that before. Memory that is mapped from one file counts once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qalora_compile as qc
from benchmarks.peers.sources import assets
from qalora_compile.api.diff import DiffSpec, diff_folders
from qalora_compile.api.tuned_session import open_tuned
from qalora_compile.capture.load_source import load_source
from qalora_compile.runtime import LanguageModel, open_session
from qalora_compile.untrusted.artifacts import MODEL_FILE


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=10, metavar="N")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_resident_of(*options.child, count=options.sessions)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = _make(folder)
        print(f"tuned folder {sizes.tuned / 1e6:.1f} MB, patch {sizes.patch / 1e6:.1f} MB")
        print(f"| {options.sessions} sessions of | MB |\n|---|---|")
        for kind in ("tuned", "patch"):
            command = [sys.executable, "-m", "benchmarks.tuned_sessions"]
            command += ["--sessions", str(options.sessions)]
            words = [kind, str(folder / "base"), str(folder / kind)]
            done = subprocess.run(
                [*command, "--child", *words], check=True, capture_output=True, text=True
            )
            print(f"| {_NAMES[kind]} | {json.loads(done.stdout) / 1e6:.0f} |")


_NAMES = {"tuned": "a folder of its own", "patch": "a patch on the base's files"}


def _make(folder: Path) -> Any:
    """Edge folders of SmolLM2-135M with two sets of random adapters, and their patch."""
    source = load_source(str(assets().model_path()))
    spec_of_layers, of_table = qc.QuantSpec(bits=4, group_size=32), qc.QuantSpec(bits=8)
    quantized = qc.quantize_groups(source.capture(), spec_of_layers, embeddings=of_table)
    base = qc.insert_adapters(quantized, qc.AdapterSpec(rank=4))
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        for key, tensor in base.module.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(tensor, std=0.003)
        cached = qc.add_kv_cache(qc.fold_adapters(base), source.model)
        (folder / name / "onnx").mkdir(parents=True)
        qc.export_model(cached, folder / name / MODEL_FILE, qc.ExportSpec(external_data=True))
    spec = DiffSpec(base=folder / "base", tuned=folder / "tuned", out=folder / "patch")
    return diff_folders(spec)


def _resident_of(kind: str, base: str, other: str, *, count: int) -> int:
    """Bytes of resident memory that the sessions take."""
    makes: list[Callable[[], Any]] = [partial(open_tuned, base, other, threads=1)] * count
    if kind == "tuned":  # as many files as models: a file is mapped once
        copies = [shutil.copytree(other, f"{other}.{index}") for index in range(count)]
        makes = [partial(open_session, copy, threads=1) for copy in copies]
    before, kept = _resident(), []
    for make in makes:
        model = LanguageModel(make())
        list(model.generate(np.array([1, 2, 3]).tolist(), max_new_tokens=1))
        kept.append(model)
    return _resident() - before


def _resident() -> int:
    """Private and shared resident bytes, each page once (proportional set size)."""
    lines = Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024


if __name__ == "__main__":
    main()
