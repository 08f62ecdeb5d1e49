"""Complete exports of the architectures of docs/reference/supported.md, compared by proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import qalora_compile as qc
from qalora_compile.api.verify import proof_pairs
from qalora_compile.errors import QaloraError
from qalora_compile.untrusted.artifacts import encoder_decoder_files
from tests.models import randomize_adapters
from tests.zoo.architectures import ARCHITECTURES, WITHOUT_CACHE
from tests.zoo.checks import ADAPTER, CAPTURED, QUANT
from tests.zoo.entries import ENTRIES
from tests.zoo.road import EXPORT, FINETUNE, FOLD, TRAINING, run, write_data, write_model

MODULES = (
    *("resnet", "conv1d", "lstm", "gru", "self-attention", "cross-attention", "symbolic-trace"),
    *("transformer-encoder", "looped", "structured", "odd-readings", "tied", "sequential"),
    *("batched-experts", "clip"),
)
"""Models of the zoo that no class of transformers with a command line stands for."""
NAMES = (*ARCHITECTURES, *MODULES)


@dataclass(frozen=True)
class Proved:
    """How the comparison of one graph ended.

    Attributes:
        name: Of the architecture, with `(encoder)` or `(decoder)` if it has two graphs.
        verdict: Of the certificate; empty if an earlier step was refused.
        sites, sites_proved: Quantized layers, and those that are proved.
        parts, parts_proved: What stands between them, likewise.
        conditions: What the proof holds under.
        left: The operators at fault where a part is not proved, or the refusal.
    """

    name: str
    verdict: str
    sites: int = 0
    sites_proved: int = 0
    parts: int = 0
    parts_proved: int = 0
    conditions: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As written in the file of results."""
        return asdict(self)


def prove(name: str, folder: Path, layers: int = 2) -> Iterator[Proved]:
    """Write the model and its export to a folder, unless they are there, and prove its graphs."""
    done = folder / "done"
    if not done.exists():
        refused = (
            _write_module(name, folder) if name in MODULES else _write_class(name, folder, layers)
        )
        done.write_text(refused, "utf-8")
    refused = done.read_text("utf-8")
    if refused:
        yield Proved(name, "", left=(refused,))
        return
    halves = encoder_decoder_files(folder / "edge")
    parts = {"": (folder / "ref", folder / "edge")}
    if halves is not None:
        parts = {
            f" ({half})": (folder / f"ref-{half}", file)
            for half, file in zip(("encoder", "decoder"), halves, strict=True)
        }
    for which, (reference, candidate) in parts.items():
        yield _proved(f"{name}{which}", reference, candidate)


def _proved(name: str, reference: Path, candidate: Path) -> Proved:
    try:
        found = qc.prove_equivalence(reference, candidate, samples=0)
    except QaloraError as error:
        return Proved(name, "refused", left=(error.what,))
    left = Counter(
        (s.problem or " ≠ ".join(s.lines or ())) for s in found.segments if s.status != "proved"
    )
    return Proved(
        name,
        str(found.verdict),
        *(len(found.sites), sum(s.status == "proved" for s in found.sites)),
        *(len(found.segments), sum(s.status == "proved" for s in found.segments)),
        found.conditions,
        tuple(text for text, _ in left.most_common()),
    )


def _write_module(name: str, folder: Path) -> str:
    """A model of the zoo by the Python interface, with random adapters."""
    torch.manual_seed(0)
    entry = ENTRIES[name]
    arguments, options = entry.inputs(*CAPTURED, 0)
    captured = qc.capture_model(entry.build(), arguments, options)
    steps = qc.Pipeline.parse("canonicalize-pointwise,annotate-linears")
    quantized = qc.quantize_groups(steps(captured).program, QUANT)
    folded = qc.fold_adapters(randomize_adapters(qc.insert_adapters(quantized, ADAPTER)))
    folded.save(folder / "ref")
    (folder / "edge").mkdir()
    qc.export_model(folded, folder / "edge" / "model.onnx", qc.ExportSpec())
    return ""


def _write_class(name: str, folder: Path, layers: int) -> str:
    """A class of transformers by the command line: one step of training, fold, export."""
    model, data, folded = folder / "model", folder / "data.jsonl", folder / "folded"
    write_model(name, model, layers)
    write_data(name, data)
    cache = ("--no-kv-cache",) if name in WITHOUT_CACHE else ()
    training = ("--data", str(data), "--out", str(folder / "run"), *TRAINING)
    for step, *arguments in (
        (FINETUNE, str(model), *training),
        (FOLD, str(folder / "run"), "--out", str(folded)),
        (EXPORT, str(folded), "--out", str(folder / "edge"), *cache),
    ):
        result = run(step, arguments)
        if result.code:
            return f"{step}: {result.reason()}"
    for half, (program, _) in proof_pairs(str(folded), str(folder / "edge")).items():
        reference = qc.Program.load(folded) if program is None else program
        reference.save(folder / (f"ref-{half}" if half else "ref"))
    return ""
