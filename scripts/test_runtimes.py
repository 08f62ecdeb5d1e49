"""Run models that are exported for a release of ONNX Runtime in that release.

`python -m scripts.test_runtimes FOLDER [RELEASE …]` exports small models for every release of
`config.onnx_releases`, each once for each form that the release gets, and runs them in the
environments `FOLDER/RELEASE`, which `make test-runtimes` installs. Outputs are compared with those
of the program. `--list` prints the releases to install instead. With `--changes`, only those
releases are meant at which the table changes, and the newest; CI runs these.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qalora_compile as qc
from qalora_compile.api import complete_spec, lowering
from qalora_compile.config.onnx_releases import RELEASES, RUNTIME, OnnxRelease
from qalora_compile.errors import QaloraError
from qalora_compile.passes.quantize_embeddings import QuantizeEmbeddings
from qalora_compile.verify.inputs import sample_inputs
from tests.models import MLP, adapted, bert, llama, outputs, token_ids

PATCHES = {
    "1.18": "1.18.0", "1.19": "1.19.2", "1.20": "1.20.1", "1.21": "1.21.1", "1.22": "1.22.1",
    "1.23": "1.23.2", "1.24": "1.24.4", "1.25": "1.25.1", "1.31": "1.31.1",
}  # fmt: skip
"""Release → the version that is run: the first or the last of its patches; `.0` for others."""
FLOAT, ROUNDED = 3e-5, 5e-2
"""Largest error relative to the largest output, for sums of two planes in float32 and for int8 or
float16 values."""
ROOT = Path(__file__).parents[1]
RUNNER = ROOT / "tests" / "runtimes" / "run_models.py"


@dataclass(frozen=True)
class Case:
    """A program, an input, and the targets and options that it is exported with."""

    name: str
    program: qc.Program
    forms: tuple[Mapping[str, Any], ...]


_LAYERS: tuple[Mapping[str, Any], ...] = (
    *({"target": target} for target in ("ort", "ort-stock", "onnx")),
    {"target": "ort-stock", "correction": "digits"},
    *({"target": target, "accuracy_level": 4} for target in ("ort", "ort-stock")),
)
_MODELS: tuple[Mapping[str, Any], ...] = tuple(
    {"target": target} for target in ("ort", "ort-stock", "onnx")
)
_FOLDERS = (*_MODELS, {"target": "ort", "parameter_dtype": "float16"})


def cases() -> Iterator[Case]:
    """Layers with a bias of every width, an encoder, and a Llama with a key-value cache."""
    torch.manual_seed(0)
    x, ids, model = torch.randn(3, 96), token_ids(2, 16), llama()
    for bits in (2, 3, 4, 8):
        quant = qc.QuantSpec(bits=bits, group_size=32)
        layers = qc.fold_adapters(adapted(MLP(96, 33, 8).eval(), (x,), quant))
        yield Case(f"layers of {bits} bits", layers, _LAYERS)
        if bits in (4, 8):
            encoder = qc.fold_adapters(adapted(bert(), (ids,), quant))
            yield Case(f"BERT of {bits} bits", encoder, _MODELS)
            folded = qc.fold_adapters(adapted(model, (ids,), quant))
            cached = qc.add_kv_cache(folded, model)
            yield Case(f"Llama of {bits} bits", cached, _MODELS)
    embeddings = QuantizeEmbeddings(bits=8, group_size=32)(cached).program
    yield Case("Llama of 8 bits with embeddings", embeddings, _FOLDERS)


def write_models(
    folder: Path, releases: tuple[OnnxRelease, ...]
) -> dict[str, list[dict[str, Any]]]:
    """Export every case; returns the release → its files, tolerances and what it is.

    Releases that get the same form share a file.
    """
    rows: dict[str, list[dict[str, Any]]] = {release.version: [] for release in releases}
    for case in cases():
        stem = case.name.replace(" ", "-")
        _write_call(case.program, folder / f"{stem}.npz")
        made: dict[str, Path] = {}
        for release, options in itertools.product(releases, case.forms):
            key = _form(case.program, release, options)
            if key is None:
                continue
            if key not in made:
                made[key] = folder / f"{stem}.{len(made)}.onnx"
                spec = qc.ExportSpec(**options, runtime=f"{RUNTIME}=={release.version}")
                qc.export_model(case.program, made[key], spec)
            rounds = "accuracy_level" in options or "parameter_dtype" in options
            limit = ROUNDED if rounds else FLOAT
            row = {"model": str(made[key]), "call": str(folder / f"{stem}.npz"), "limit": limit}
            rows[release.version].append(row | {"what": f"{case.name}, {json.dumps(options)}"})
    return rows


def _form(program: qc.Program, release: OnnxRelease, options: Mapping[str, Any]) -> str | None:
    """What determines the file; None if the release has no form of it."""
    try:
        spec = qc.ExportSpec(**options, runtime=f"{RUNTIME}=={release.version}")
        complete = complete_spec(program, spec)
        steps = lowering(program, complete)
    except QaloraError:
        return None
    bias = release.bias or complete.target != "ort-stock"
    return f"{replace(complete, runtime=None)} {[str(step) for step in steps]} {bias}"


def _write_call(program: qc.Program, path: Path) -> None:
    """Write an input and the program's outputs for it, by name."""
    call = next(iter(sample_inputs(program, 1, seed=0)))
    args, named = (call, {}) if isinstance(call, tuple) else ((), call)
    with torch.no_grad():
        found = outputs(program.eval()(*args, **named))
    leaves = zip(program.signature.inputs, program.leaves(args, named), strict=True)
    given = {f"in {leaf.name}": value.numpy() for leaf, value in leaves if leaf.dtype is not None}
    names = [f"out {name}" for name in program.signature.outputs]
    made = {name: value.numpy() for name, value in zip(names, found, strict=True)}
    np.savez(path, allow_pickle=False, **given, **made)


def version_of(release: OnnxRelease) -> str:
    """The version of a release that is installed and run."""
    return PATCHES.get(release.version, f"{release.version}.0")


def changes() -> tuple[str, ...]:
    """The oldest release, each that takes something more than the one before, and the newest."""
    pairs = itertools.pairwise(RELEASES)
    more = [b.version for a, b in pairs if replace(a, version=b.version) != b]
    ends = RELEASES[0].version, RELEASES[-1].version
    return tuple(dict.fromkeys((ends[0], *more, ends[1])))


def run(environments: Path, only: tuple[str, ...]) -> int:
    """Run every model in every environment that is there; returns how many failed."""
    failed = ran = 0
    releases = tuple(r for r in RELEASES if not only or r.version in only)
    with tempfile.TemporaryDirectory() as scratch:
        rows = write_models(Path(scratch), releases)
        for release in releases:
            python = environments / version_of(release) / "bin" / "python"
            listed = Path(scratch) / "models.json"
            listed.write_text(json.dumps(rows[release.version]), "utf-8")
            done = subprocess.run([python, RUNNER, listed], check=False)
            failed, ran = failed + bool(done.returncode), ran + 1
    print(f"{ran} releases, {failed} of them failed")
    return int(failed or not ran)


def main() -> int:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/runtimes"))
    parser.add_argument("releases", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--changes", action="store_true")
    options = parser.parse_args()
    only = (*options.releases, *(changes() if options.changes else ()))
    if options.list:
        print("\n".join(version_of(r) for r in RELEASES if not only or r.version in only))
        return 0
    return run(options.folder, only)


if __name__ == "__main__":
    sys.exit(main())
